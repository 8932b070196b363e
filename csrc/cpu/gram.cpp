// gram_update_ on the CPU: C <- decay * C + X^T X.
//
// The product is symmetric, so only its upper triangle is computed and then mirrored: about half the multiplications,
// and a bit-symmetric result. bfloat16 rows are multiplied as they are where the processor can, with float32
// accumulation: by MKL on AMX's matrix units, by gram_bfloat16.cpp on AVX512_BF16's dot products, which MKL uses badly
// (slower than float32 on an AMD EPYC). Elsewhere they become float32, in pieces that stay in the cache.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <torch/library.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <climits>
#include <limits>

#include "../checks.h"
#include "gram_bfloat16.h"

// MKL's product of bfloat16 matrices with a float32 result (mkl_cblas.h, 32-bit integers). A torch built on another
// BLAS does not have it: the symbol is weak, and null there.
extern "C" void cblas_gemm_bf16bf16f32(int layout, int transpose_a, int transpose_b, int m, int n, int k, float alpha,
                                       const c10::BFloat16* a, int lda, const c10::BFloat16* b, int ldb, float beta,
                                       float* c, int ldc) __attribute__((weak));

namespace janus {
namespace {

constexpr int64_t kPanel = 48;             // columns of a panel: what BLAS's own float32 kernels take at once
constexpr int64_t kChunkBytes = 1 << 20;   // rows of X at a time: they stay in the second-level cache
constexpr int64_t kBFloat16Columns = 192;  // of a block; wider ones waste multiplications, narrower ones starve
constexpr int64_t kTile = 32;              // mirrored tile: two of them stay in the first-level cache

// The upper triangle in tiles of kPanel columns, numbered down panel after panel: every thread takes an equal share of
// them, goes through X once, and multiplies what it has of each panel in one product.
void add_upper_triangle(const Tensor& C, const Tensor& rows, double decay) {
  const int64_t n = C.size(0), N = rows.size(0), panels = (n + kPanel - 1) / kPanel;
  const int64_t chunk = std::max<int64_t>(256, kChunkBytes / (n * C.element_size()));
  at::parallel_for(0, panels * (panels + 1) / 2, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;  // worker threads start with gradients on
    for (int64_t from = 0; from < std::max<int64_t>(N, 1); from += chunk) {
      const Tensor X = rows.slice(0, from, from + chunk).to(C.scalar_type());
      for (int64_t panel = 0, first = 0; first < end; first += ++panel) {  // panel p has tiles first .. first + p
        const int64_t top = std::max<int64_t>(begin - first, 0), bottom = std::min(end - first, panel + 1);
        if (top >= bottom) continue;
        const int64_t left = panel * kPanel, right = left + kPanel, low = top * kPanel, high = bottom * kPanel;
        Tensor block = C.slice(0, low, high).slice(1, left, right);
        block.addmm_(X.slice(1, low, high).t(), X.slice(1, left, right), from == 0 ? decay : 1);
      }
    }
  });
}

bool has_matrix_units() {
#if defined(__x86_64__)
  static const bool supported = [] {
    constexpr unsigned kAmxBFloat16 = 1u << 22;  // of EDX; not every compiler knows the name
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kAmxBFloat16) != 0;
    return amx && cblas_gemm_bf16bf16f32 != nullptr && at::get_cpu_capability() == "AVX512";
  }();
  return supported;
#else
  return false;
#endif
}

// Block columns down to their diagonal block. Row-major X [N, n] is column-major X^T, so BLAS computes the transpose of
// each block; MKL shares a block out among torch's threads by itself.
void add_upper_blocks_bfloat16(const Tensor& C, const Tensor& rows, double decay) {
  constexpr int kColumnMajor = 102, kPlain = 111, kTransposed = 112;
  const auto n = static_cast<int>(C.size(0)), N = static_cast<int>(rows.size(0));
  const auto* X = rows.const_data_ptr<c10::BFloat16>();
  auto* out = C.mutable_data_ptr<float>();
  // With beta = 0 BLAS would lose a NaN in C; a decay below the range of float32 must not round to that.
  const float beta = std::max(static_cast<float>(decay), std::numeric_limits<float>::min());
  for (int begin = 0; begin < n; begin += kBFloat16Columns) {
    const int end = std::min(n, begin + static_cast<int>(kBFloat16Columns));
    cblas_gemm_bf16bf16f32(kColumnMajor, kPlain, kTransposed, end - begin, end, N, 1, X + begin, n, X, n, beta,
                           out + begin, n);
  }
}

template <typename scalar_t>
void mirror_upper(scalar_t* C, int64_t n) {
  const int64_t tiles = (n + kTile - 1) / kTile;
  at::parallel_for(0, tiles * tiles, tiles, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t top = tile / tiles * kTile, left = tile % tiles * kTile;
      for (int64_t row = top; row < std::min(n, top + kTile); ++row)
        for (int64_t column = left; column < std::min(row, left + kTile); ++column)
          C[row * n + column] = C[column * n + row];
    }
  });
}

void add_product(const Tensor& C, const Tensor& rows, double decay) {
  const bool half = rows.scalar_type() == at::kBFloat16 && C.scalar_type() == at::kFloat;
  if (half && has_matrix_units() && std::max(C.size(0), rows.size(0)) < INT_MAX)
    add_upper_blocks_bfloat16(C, rows.contiguous(), decay);
  else if (half && has_bfloat16_dot())
    add_upper_triangle_bfloat16(C, rows.contiguous(), decay);
  else
    add_upper_triangle(C, rows, decay);
}

void gram_update_(const Tensor& gram, const Tensor& x, double decay) {
  check_gram_update(gram, x, decay);
  const int64_t n = gram.size(0);
  const Tensor rows = x.reshape({-1, n}), C = gram.contiguous();
  bump_version(gram);
  add_product(C, rows.is_alias_of(gram) ? rows.clone() : rows, decay);
  AT_DISPATCH_FLOATING_TYPES(C.scalar_type(), "gram_update_", [&] { mirror_upper(C.mutable_data_ptr<scalar_t>(), n); });
  if (!gram.is_same(C)) gram.copy_(C);
}

}  // namespace
}  // namespace janus

TORCH_LIBRARY_IMPL(janus_ext, CPU, m) {
  m.impl("gram_update_", TORCH_FN(janus::gram_update_));
}
