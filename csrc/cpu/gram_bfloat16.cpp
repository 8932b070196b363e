// The product of gram_update_ for bfloat16 on a processor with AVX512_BF16 and without matrix units: vdpbf16ps
// multiplies pairs of bfloat16 and adds both products to a float32 sum.
//
// Two rows of X are interleaved, so that a pair (x[2q][j], x[2q + 1][j]) is one 32-bit number P[q][j]. Then a tile of C
// is
//
//   C[i][j] += sum_q  dot(P[q][i], P[q][j])
//
// with P[q][i] broadcast and P[q][j .. j + 32] loaded: one packed copy serves both sides, and nothing is transposed.
#include "gram_bfloat16.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define JANUS_BFLOAT16_DOT __attribute__((target("avx512f,avx512bw,avx512bf16")))
#endif

namespace janus {

#if defined(__x86_64__)
namespace {

constexpr int kRows = 12, kColumns = 32;         // of a tile: 24 sums, in registers with what they are made of
constexpr int64_t kMostRows = 512;               // of X at a time
constexpr int64_t kPackedBytes = 3 * (1 << 18);  // of them, packed: they stay in the second-level cache

// Pairs of rows: packed [ceil(rows / 2), pitch], what is beyond n stays as it is. A last row alone has zeros beside it.
JANUS_BFLOAT16_DOT void pack(const uint16_t* x, int64_t rows, int64_t n, uint32_t* packed, int64_t pitch) {
  for (int64_t r = 0; r + 1 < rows; r += 2, x += 2 * n, packed += pitch)
    for (int64_t j = 0; j < n; ++j) packed[j] = x[j] | static_cast<uint32_t>(x[n + j]) << 16;
  if (rows % 2 != 0)
    for (int64_t j = 0; j < n; ++j) packed[j] = x[j];
}

__mmask16 first(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << std::max<int64_t>(count, 0)) - 1);
}

// C[i .. i + kRows][j .. j + kColumns] <- decay C + their sums over the packed pairs, as far as C goes.
JANUS_BFLOAT16_DOT void add_tile(const uint32_t* packed, int64_t pitch, int64_t pairs, int64_t i, int64_t j, float* C,
                                 int64_t n, float decay) {
  __m512 sums[kRows][2];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  for (int64_t q = 0; q < pairs; ++q, packed += pitch) {
    const auto left = (__m512bh)_mm512_loadu_si512(packed + j), right = (__m512bh)_mm512_loadu_si512(packed + j + 16);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const auto row = (__m512bh)_mm512_set1_epi32(static_cast<int>(packed[i + r]));
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], row, left);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], row, right);
    }
  }
  const __m512 factor = _mm512_set1_ps(decay);
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    if (i + r >= n) continue;  // no break: the loop must unroll for the sums to be registers
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      float* to = C + (i + r) * n + j + 16 * half;
      const __mmask16 inside = first(n - j - 16 * half);
      const __m512 old = _mm512_maskz_loadu_ps(inside, to);
      _mm512_mask_storeu_ps(to, inside, _mm512_fmadd_ps(old, factor, sums[r][half]));
    }
  }
}

}  // namespace

bool has_bfloat16_dot() {
  static const bool supported = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                                at::get_cpu_capability() == "AVX512";
  return supported;
}

// Every thread takes an equal share of the tiles, goes through X once, and packs it for itself: one operation for every
// n / 2 of the product, times the number of threads. Measured on one and two.
void add_upper_triangle_bfloat16(const at::Tensor& C, const at::Tensor& X, double decay) {
  const int64_t n = C.size(0), N = X.size(0), pitch = (n + kColumns - 1) / kColumns * kColumns + kRows;
  const int64_t room = kPackedBytes / (2 * pitch) / 2 * 2, step = std::clamp<int64_t>(room, 32, kMostRows);
  std::vector<std::pair<int64_t, int64_t>> tiles;  // their first row and column
  for (int64_t j = 0; j < n; j += kColumns)
    for (int64_t i = 0; i < std::min(n, j + kColumns); i += kRows) tiles.emplace_back(i, j);
  const auto* x = reinterpret_cast<const uint16_t*>(X.const_data_ptr<at::BFloat16>());
  auto* out = C.mutable_data_ptr<float>();
  // A decay below the range of float32 must not lose what C holds of inf.
  const float factor = std::max(static_cast<float>(decay), std::numeric_limits<float>::min());
  at::parallel_for(0, static_cast<int64_t>(tiles.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> packed(step / 2 * pitch);
    for (int64_t from = 0; from < std::max<int64_t>(N, 1); from += step) {
      const int64_t rows = std::min(step, N - from);
      pack(x + from * n, rows, n, packed.data(), pitch);
      for (int64_t t = begin; t < end; ++t)
        add_tile(packed.data(), pitch, (rows + 1) / 2, tiles[t].first, tiles[t].second, out, n, from == 0 ? factor : 1);
    }
  });
}
#else
bool has_bfloat16_dot() {
  return false;
}

void add_upper_triangle_bfloat16(const at::Tensor&, const at::Tensor&, double) {}
#endif

}  // namespace janus
