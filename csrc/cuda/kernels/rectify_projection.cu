// The products with V of rectify_ on CUDA, see rectify.cu: M = [g_A; A] V, then g_A <- g_A - M_g V^T.
#include <cstdint>

#include "rectify_batch.h"

namespace janus::kernels {
namespace {

constexpr int kGroups = kThreads / kTile;
constexpr int kPart = 16;   // rows of a factor that one block multiplies with V or V^T
constexpr int kSlice = 64;  // terms of such a product in shared memory at a time

__device__ Vectors<const float> read_only(const Vectors<float>& vectors) {
  return {vectors.data, vectors.vector_stride, vectors.component_stride};
}

// A block's product of kSides factors, kPart rows each, with kTile columns of V or V^T. Whole warps read `left` at one
// address, 16 bytes at a time: hence its alignment, and a pitch that is a multiple of 4 but not of 32.
template <int kSides>
struct Product {
  static constexpr int kRows = kSides * kPart;
  static constexpr int kLeftPitch = kRows + 4;
  alignas(16) float left[kSlice * kLeftPitch];
  float right[kSlice * kPitch];
  float out[kRows * kPitch];
};

struct Range {
  int64_t begin, end;
};

// to [kSlice][pitch] <- components[.begin + 0 .. kWide] of vectors[.begin + 0 .. kSlice], zeros beyond the end.
template <int kWide>
__device__ void load_slice(const Vectors<const float>& from, Range vectors, Range components, float* to, int pitch) {
  static_assert(kSlice * kWide % kThreads == 0, "whole turns");
  const bool along = from.component_stride == 1;  // neighbouring threads touch neighbouring memory
#pragma unroll
  for (int turn = 0; turn < kSlice * kWide / kThreads; ++turn) {
    const int e = turn * kThreads + threadIdx.x;
    const int v = along ? e / kWide : e % kSlice, c = along ? e % kWide : e / kSlice;
    const int64_t vector = vectors.begin + v, component = components.begin + c;
    to[v * pitch + c] = vector < vectors.end && component < components.end ? at(from, vector, component) : 0.f;
  }
}

// p.out [c][x] <- sum_t left(t, rows.begin + c) right(t, columns.begin + x) over t < terms, for every side. A lane has
// a column x and a warp every kGroups-th term, for all c at once, so that a read of V serves all rows. Then the warps
// add up one after the other, always in this order.
template <int kSides>
__device__ void multiply_slices(const Vectors<const float>* left, Range rows, const Vectors<const float>& right,
                                Range columns, int64_t terms, Product<kSides>& p) {
  constexpr int kRows = Product<kSides>::kRows, kLeftPitch = Product<kSides>::kLeftPitch;
  const int lane = threadIdx.x % kTile, group = threadIdx.x / kTile;
  float sums[kRows] = {};
  for (int64_t t = 0; t < terms; t += kSlice) {
    for (int side = 0; side < kSides; ++side)
      load_slice<kPart>(left[side], {t, terms}, rows, p.left + side * kPart, kLeftPitch);
    load_slice<kTile>(right, {t, terms}, columns, p.right, kPitch);
    __syncthreads();
#pragma unroll
    for (int i = group; i < kSlice; i += kGroups) {
      const float x = p.right[i * kPitch + lane];
#pragma unroll
      for (int c = 0; c < kRows; ++c) sums[c] += p.left[i * kLeftPitch + c] * x;
    }
    __syncthreads();
  }
  for (int turn = 0; turn < kGroups; ++turn) {
    if (turn == group) {
#pragma unroll
      for (int c = 0; c < kRows; ++c)
        p.out[c * kPitch + lane] = turn == 0 ? sums[c] : p.out[c * kPitch + lane] + sums[c];
    }
    __syncthreads();
  }
}

// M [kSides r, k] <- [g_A; A] V, or g_A V alone. Three blocks at a time on a multiprocessor hide each other's loads.
template <int kSides>
__global__ void __launch_bounds__(kThreads, 3) inside_kernel(const __grid_constant__ Batch batch, float* workspace) {
  __shared__ Product<kSides> product;
  const Layer& layer = batch.layers[blockIdx.y];
  const int r = layer.rank, k = layer.k, row = blockIdx.z * kPart, column = blockIdx.x * kTile;
  if (row >= r || column >= k) return;
  const Vectors<const float> factors[] = {read_only(layer.grad_A), layer.A};
  multiply_slices(factors, {row, r}, layer.basis, {column, k}, layer.n, product);
  float* M = products_of(workspace, batch, blockIdx.y);
  for (int e = threadIdx.x; e < product.kRows * kTile; e += kThreads) {
    const int c = e / kTile, x = e % kTile, side = c / kPart, i = row + c % kPart, j = column + x;
    if (i < r && j < k) M[static_cast<int64_t>(side * r + i) * k + j] = product.out[c * kPitch + x];
  }
}

// g_A <- g_A - M_g V^T.
__global__ void __launch_bounds__(kThreads) outside_kernel(const __grid_constant__ Batch batch, float* workspace) {
  __shared__ Product<1> product;
  const Layer& layer = batch.layers[blockIdx.y];
  const int r = layer.rank, k = layer.k, row = blockIdx.z * kPart;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTile;
  if (row >= r || begin >= layer.n || k == 0) return;
  const Vectors<const float> M = {products_of(workspace, batch, blockIdx.y), 1, k};  // its k columns
  const Vectors<const float> transposed = {layer.basis.data, layer.basis.component_stride, layer.basis.vector_stride};
  multiply_slices(&M, {row, r}, transposed, {begin, layer.n}, k, product);
  for (int e = threadIdx.x; e < kPart * kTile; e += kThreads) {
    const auto [v, c] = place(layer.grad_A, e, kPart);
    if (begin + v < layer.n && row + c < r) at(layer.grad_A, begin + v, row + c) -= product.out[c * kPitch + v];
  }
}

}  // namespace

void launch_projection(const Batch& batch, unsigned count, const Sizes& sizes, float* workspace, cudaStream_t stream) {
  if (sizes.k == 0) return;
  const unsigned parts = blocks(sizes.rank, kPart);
  const dim3 inside(blocks(sizes.k, kTile), count, parts), outside(blocks(sizes.n, kTile), count, parts);
  if (batch.options.only_project)
    inside_kernel<1><<<inside, kThreads, 0, stream>>>(batch, workspace);
  else
    inside_kernel<2><<<inside, kThreads, 0, stream>>>(batch, workspace);
  outside_kernel<<<outside, kThreads, 0, stream>>>(batch, workspace);
}

}  // namespace janus::kernels
