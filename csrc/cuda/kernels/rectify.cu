// rectify_ on CUDA, rank up to 64: the formula of rectified.h,
//
//   g_A <- g_A - (g_A V) V^T
//   dA = B^+ g_A - share C A,   dB = g_B A^+ - (1 - share) B C,   C = B^+ g_B A^+ = (B^T B)^-1 (B^T g_B) (A A^T)^-1
//
// times tr(B^T B)/r and tr(A A^T)/r if balanced, else 1/s^2, with damped inverses. Four launches for all layers:
//
//   inside_kernel    M = [g_A; A] V, a block for every few columns of V (rectify_projection.cu)
//   outside_kernel   g_A <- g_A - M_g V^T, a block for every few columns of g_A
//   algebra_kernel   what is r x r, in shared memory, a block a layer; whether A V = 0, |M_A| <= tolerance |A|
//   apply_kernel     dA and dB, a block for every few columns of A and rows of B; zeros where A V = 0 does not hold
//
// Factors, gradients and V look alike here: vectors of some components (see Vectors). All sums are float32 and have a
// fixed order, so that a call gives the same bits every time.
#include <algorithm>
#include <cfloat>

#include "rectify_batch.h"

namespace janus::kernels {
namespace {

// Floats of the workspace for one layer.
int64_t workspace_pitch(const Layer* layers, int64_t count) {
  int64_t products = 0;
  for (int64_t i = 0; i < count; ++i) products = std::max(products, int64_t{2} * layers[i].rank * layers[i].k);
  return static_cast<int64_t>(sizeof(Algebra) / sizeof(float)) + products;
}

// tile [r][kPitch] <- vectors begin .. begin + kTile, zeros beyond the last. The caller waits for it; all functions
// after this one end with a barrier, so that their results may be read at once.
template <typename T>
__device__ void load_tile(const Vectors<T>& vectors, int64_t begin, int64_t count, int r, float* tile) {
  for (int e = threadIdx.x; e < kTile * r; e += kThreads) {
    const auto [v, c] = place(vectors, e, r);
    tile[c * kPitch + v] = begin + v < count ? at(vectors, begin + v, c) : 0.f;
  }
}

// out [r, r] <- sum_v left_v right_v^T. A partial sum for every tile keeps the rounding of long sums small.
template <typename L, typename R>
__device__ void inner_products(const Vectors<L>& left, const Vectors<R>& right, int64_t count, int r, float* tiles,
                               float* out) {
  float *left_tile = tiles, *right_tile = tiles + r * kPitch;
  for (int e = threadIdx.x; e < r * r; e += kThreads) out[e] = 0;
  __syncthreads();
  for (int64_t begin = 0; begin < count; begin += kTile) {
    load_tile(left, begin, count, r, left_tile);
    load_tile(right, begin, count, r, right_tile);
    __syncthreads();
    for (int e = threadIdx.x; e < r * r; e += kThreads) {
      const float *a = left_tile + e / r * kPitch, *b = right_tile + e % r * kPitch;
      float sum = 0;
      for (int v = 0; v < kTile; ++v) sum += a[v] * b[v];
      out[e] += sum;
    }
    __syncthreads();
  }
}

// S [r, r] <- its Cholesky factor L in the lower triangle. Every pivot of S = PSD + d I is at least d; rounding may not
// take it below. A NaN stays one.
__device__ void cholesky(float* S, int r, float d) {
  for (int p = 0; p < r; ++p) {
    const float pivot = S[p * r + p];
    const float root = sqrtf(pivot < d ? d : pivot);
    __syncthreads();  // all have read the pivot
    for (int i = p + threadIdx.x; i < r; i += kThreads) S[i * r + p] = i == p ? root : S[i * r + p] / root;
    __syncthreads();
    for (int e = threadIdx.x; e < r * r; e += kThreads) {
      const int i = e / r, j = e % r;
      if (p < j && j <= i) S[e] -= S[i * r + p] * S[j * r + p];
    }
    __syncthreads();
  }
}

// X [r, r] <- (L L^T)^-1: a thread solves L y = e_c, then L^T x = y, in column c.
__device__ void invert(const float* L, int r, float* X) {
  const int c = threadIdx.x;
  for (int i = 0; c < r && i < r; ++i) {
    float y = i == c ? 1.f : 0.f;
    for (int l = 0; l < i; ++l) y -= L[i * r + l] * X[l * r + c];
    X[i * r + c] = y / L[i * r + i];
  }
  for (int i = r - 1; c < r && i >= 0; --i) {
    float x = X[i * r + c];
    for (int l = i + 1; l < r; ++l) x -= L[l * r + i] * X[l * r + c];
    X[i * r + c] = x / L[i * r + i];
  }
  __syncthreads();
}

// inverse [r, r] <- (S + d I)^-1, d = max(damping, 4 r eps) max(tr S / r, floor); returns tr S / r. S is overwritten.
__device__ float damped_inverse(float* S, int r, const RectifyOptions& options, float* inverse) {
  float mean = 0;
  for (int i = 0; i < r; ++i) mean += S[i * r + i];
  mean /= r;
  const float d = fmaxf(options.damping, 4 * r * FLT_EPSILON) * (mean < options.floor ? options.floor : mean);
  __syncthreads();  // all have read the diagonal
  for (int i = threadIdx.x; i < r; i += kThreads) S[i * r + i] += d;
  __syncthreads();
  cholesky(S, r, d);
  invert(S, r, inverse);
  return mean;
}

// out [r, r] <- X Y.
__device__ void multiply(const float* X, const float* Y, int r, float* out) {
  for (int e = threadIdx.x; e < r * r; e += kThreads) {
    float sum = 0;
    for (int l = 0; l < r; ++l) sum += X[e / r * r + l] * Y[l * r + e % r];
    out[e] = sum;
  }
  __syncthreads();
}

__device__ void copy(const float* from, int r, float* to) {
  for (int e = threadIdx.x; e < r * r; e += kThreads) to[e] = from[e];
  __syncthreads();
}

// out.unsafe <- whether |M_A| > tolerance |A|, and a note of it for the host, which would otherwise have to wait at
// every step. A NaN passes, and reaches the gradients. Targets of a layer are looked at one by one.
__device__ void check_safe_factor(const Layer& layer, const float* M_A, float square_A, const RectifyOptions& options,
                                  Algebra& out) {
  __shared__ float partial[kThreads];
  float sum = 0;
  for (int64_t e = threadIdx.x; e < static_cast<int64_t>(layer.rank) * layer.k; e += kThreads) sum += M_A[e] * M_A[e];
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kThreads; ++i) sum += partial[i];
  const float inside = sqrtf(sum), whole = sqrtf(square_A);
  out.unsafe = inside > options.tolerance * whole;
  Finding* finding = options.finding;
  if (!out.unsafe || atomicCAS_system(&finding->layer, kNothingFound, kBeingWritten) != kNothingFound) return;
  finding->inside = inside;
  finding->whole = whole;
  __threadfence_system();
  atomicExch_system(&finding->layer, layer.index);
}

// Shared memory: S [r, r], then room for two tiles, which an [r, r] matrix takes over when the tiles are done with.
int64_t algebra_shared(int r) {
  return r * r + std::max(r * r, 2 * r * kPitch);
}

__global__ void __launch_bounds__(kThreads) algebra_kernel(const __grid_constant__ Batch batch, float* workspace) {
  extern __shared__ float shared[];
  const Layer& layer = batch.layers[blockIdx.x];
  Algebra& out = algebra_of(workspace, batch, blockIdx.x);
  const int r = layer.rank;
  float *S = shared, *scratch = shared + r * r;

  inner_products(layer.A, layer.A, layer.n, r, scratch, S);
  const float mean_A = damped_inverse(S, r, batch.options, scratch);
  copy(scratch, r, out.inverse_A);
  if (layer.k > 0 && batch.options.finding != nullptr) {
    const float* M = products_of(workspace, batch, blockIdx.x);
    check_safe_factor(layer, M + static_cast<int64_t>(r) * layer.k, r * mean_A, batch.options, out);
  } else if (threadIdx.x == 0) {
    out.unsafe = false;
  }
  inner_products(layer.B, layer.B, layer.m, r, scratch, S);
  const float mean_B = damped_inverse(S, r, batch.options, scratch);
  copy(scratch, r, out.inverse_B);
  inner_products(layer.B, layer.grad_B, layer.m, r, scratch, S);
  multiply(out.inverse_B, S, r, scratch);
  multiply(scratch, out.inverse_A, r, out.common);
  if (threadIdx.x == 0) {
    out.mean_A = mean_A;
    out.mean_B = mean_B;
  }
}

// grad_v <- gain (X grad_v - weight C factor_v), X the inverse, gain 1/s^2 or the mean, for kTile vectors: so for a
// column of A, while a row of B is multiplied from the other side and takes X^T and C^T. Four blocks at a time on a
// multiprocessor.
__global__ void __launch_bounds__(kThreads, 4) apply_kernel(const __grid_constant__ Batch batch, float* workspace) {
  extern __shared__ float shared[];
  const Layer& layer = batch.layers[blockIdx.y];
  const Algebra& algebra = algebra_of(workspace, batch, blockIdx.y);
  const RectifyOptions& options = batch.options;
  const bool is_A = blockIdx.z == 0;
  const Vectors<const float>& factor = is_A ? layer.A : layer.B;
  const Vectors<float>& grad = is_A ? layer.grad_A : layer.grad_B;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTile, count = is_A ? layer.n : layer.m;
  if (begin >= count) return;

  const int r = layer.rank, row = is_A ? r : 1, column = is_A ? 1 : r;  // strides of X or X^T
  const float* inverse = is_A ? algebra.inverse_B : algebra.inverse_A;
  const float weight = is_A ? options.share : 1 - options.share;
  const float mean = is_A ? algebra.mean_B : algebra.mean_A, once = layer.inverse_scale;
  float *grads = shared, *factors = shared + r * kPitch;  // the block reads all of its gradients before it writes any
  load_tile(grad, begin, count, r, grads);
  load_tile(factor, begin, count, r, factors);
  __syncthreads();
  for (int e = threadIdx.x; e < kTile * r; e += kThreads) {
    const auto [v, c] = place(grad, e, r);
    if (begin + v >= count) continue;
    float own = 0, common = 0;
    for (int l = 0; l < r; ++l) {
      own += inverse[c * row + l * column] * grads[l * kPitch + v];
      common += algebra.common[c * row + l * column] * factors[l * kPitch + v];
    }
    const float update = own - weight * common;
    at(grad, begin + v, c) = algebra.unsafe ? 0.f : options.balance ? mean * update : once * update * once;
  }
}

Sizes largest(const Layer* layers, int64_t count) {
  Sizes sizes;
  for (int64_t i = 0; i < count; ++i) {
    sizes.rank = std::max(sizes.rank, layers[i].rank);
    sizes.k = std::max(sizes.k, layers[i].k);
    sizes.n = std::max(sizes.n, layers[i].n);
    sizes.m = std::max(sizes.m, layers[i].m);
  }
  return sizes;
}

void launch_rectification(const Batch& batch, unsigned count, const Sizes& sizes, float* workspace,
                          cudaStream_t stream) {
  if (batch.options.only_project) return;
  algebra_kernel<<<count, kThreads, algebra_shared(sizes.rank) * sizeof(float), stream>>>(batch, workspace);
  const dim3 grid(blocks(std::max(sizes.n, sizes.m), kTile), count, 2);
  apply_kernel<<<grid, kThreads, 2 * sizes.rank * kPitch * sizeof(float), stream>>>(batch, workspace);
}

}  // namespace

int64_t rectify_workspace(const Layer* layers, int64_t count) {
  return std::min<int64_t>(count, kLayersPerLaunch) * workspace_pitch(layers, count);
}

cudaError_t rectify(const Layer* layers, int64_t count, const RectifyOptions& options, float* workspace,
                    cudaStream_t stream) {
  for (int64_t begin = 0; begin < count; begin += kLayersPerLaunch) {  // the stream orders the uses of the workspace
    const int64_t taken = std::min<int64_t>(count - begin, kLayersPerLaunch);
    Batch batch{};
    std::copy_n(layers + begin, taken, batch.layers);
    batch.options = options;
    batch.pitch = workspace_pitch(batch.layers, taken);
    const Sizes sizes = largest(batch.layers, taken);
    launch_projection(batch, static_cast<unsigned>(taken), sizes, workspace, stream);
    launch_rectification(batch, static_cast<unsigned>(taken), sizes, workspace, stream);
    const auto error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace janus::kernels
