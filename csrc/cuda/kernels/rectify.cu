// rectify_ on CUDA, rank up to 64: the formula of rectified.h,
//
//   dA = B^+ g_A - share C A,   dB = g_B A^+ - (1 - share) B C,   C = B^+ g_B A^+ = (B^T B)^-1 (B^T g_B) (A A^T)^-1
//
// times tr(B^T B)/r and tr(A A^T)/r if balanced, else 1/s^2, with damped inverses. All of it but the last two products
// is r x r. So: one block a layer for the r x r algebra in shared memory, then one block for every few columns of A and
// rows of B of every layer. Both factors look alike here: vectors of r components (see Vectors).
#include <algorithm>
#include <cfloat>

#include "rectify.h"

namespace janus::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 32;          // vectors in shared memory at a time
constexpr int kPitch = kTile + 1;  // of a tile [r][kPitch]: odd, against bank conflicts

struct Batch {
  Layer layers[kLayersPerLaunch];
  RectifyOptions options;
};
static_assert(sizeof(Batch) + sizeof(float*) <= 4096, "kernel parameters");

struct Algebra {  // of one layer, [r, r] each, but for the two numbers tr(A A^T)/r and tr(B^T B)/r
  float inverse_A[kMaxRank * kMaxRank], inverse_B[kMaxRank * kMaxRank], common[kMaxRank * kMaxRank];
  float mean_A, mean_B;
};

// Places in a tile, dealt out so that neighbouring threads touch neighbouring memory, in A as in B.
struct Place {
  int vector, component;
};
template <typename T>
__device__ Place place(const Vectors<T>& vectors, int element, int r) {
  if (vectors.component_stride == 1) return {element / r, element % r};
  return {element % kTile, element / kTile};
}

template <typename T>
__device__ T& at(const Vectors<T>& vectors, int64_t vector, int component) {
  return vectors.data[vector * vectors.vector_stride + component * vectors.component_stride];
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

// Shared memory: S [r, r], then room for two tiles, which an [r, r] matrix takes over when the tiles are done with.
int64_t algebra_shared(int r) {
  return r * r + std::max(r * r, 2 * r * kPitch);
}

__global__ void __launch_bounds__(kThreads) algebra_kernel(const __grid_constant__ Batch batch, Algebra* workspace) {
  extern __shared__ float shared[];
  const Layer& layer = batch.layers[blockIdx.x];
  Algebra& out = workspace[blockIdx.x];
  const int r = layer.rank;
  float *S = shared, *scratch = shared + r * r;

  inner_products(layer.A, layer.A, layer.n, r, scratch, S);
  const float mean_A = damped_inverse(S, r, batch.options, scratch);
  copy(scratch, r, out.inverse_A);
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

// grad_v <- gain (M grad_v - weight C factor_v), M the inverse, for kTile vectors: so for a column of A, while a row of
// B is multiplied from the other side and takes M^T and C^T.
__global__ void __launch_bounds__(kThreads) apply_kernel(const __grid_constant__ Batch batch,
                                                         const Algebra* workspace) {
  extern __shared__ float shared[];
  const Layer& layer = batch.layers[blockIdx.y];
  const Algebra& algebra = workspace[blockIdx.y];
  const RectifyOptions& options = batch.options;
  const bool is_A = blockIdx.z == 0;
  const Vectors<const float>& factor = is_A ? layer.A : layer.B;
  const Vectors<float>& grad = is_A ? layer.grad_A : layer.grad_B;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTile, count = is_A ? layer.n : layer.m;
  if (begin >= count) return;

  const int r = layer.rank, row = is_A ? r : 1, column = is_A ? 1 : r;  // strides of M or M^T
  const float* inverse = is_A ? algebra.inverse_B : algebra.inverse_A;
  const float weight = is_A ? options.share : 1 - options.share;
  const float gain = !options.balance ? layer.gain : is_A ? algebra.mean_B : algebra.mean_A;
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
    at(grad, begin + v, c) = gain * (own - weight * common);
  }
}

cudaError_t launch(const Batch& batch, int count, Algebra* workspace, cudaStream_t stream) {
  int rank = 0;
  int64_t vectors = 0;
  for (int i = 0; i < count; ++i) {
    rank = std::max(rank, batch.layers[i].rank);
    vectors = std::max({vectors, batch.layers[i].n, batch.layers[i].m});
  }
  if (vectors == 0) return cudaSuccess;
  algebra_kernel<<<count, kThreads, algebra_shared(rank) * sizeof(float), stream>>>(batch, workspace);
  if (const auto error = cudaGetLastError(); error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>((vectors + kTile - 1) / kTile), count, 2);
  apply_kernel<<<grid, kThreads, 2 * rank * kPitch * sizeof(float), stream>>>(batch, workspace);
  return cudaGetLastError();
}

}  // namespace

int64_t rectify_workspace(int64_t layers) {
  return std::min<int64_t>(layers, kLayersPerLaunch) * static_cast<int64_t>(sizeof(Algebra) / sizeof(float));
}

cudaError_t rectify(const Layer* layers, int64_t count, const RectifyOptions& options, float* workspace,
                    cudaStream_t stream) {
  for (int64_t begin = 0; begin < count; begin += kLayersPerLaunch) {  // the stream orders the uses of the workspace
    const auto taken = static_cast<int>(std::min<int64_t>(count - begin, kLayersPerLaunch));
    Batch batch{};
    std::copy_n(layers + begin, taken, batch.layers);
    batch.options = options;
    const auto error = launch(batch, taken, reinterpret_cast<Algebra*>(workspace), stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace janus::kernels
