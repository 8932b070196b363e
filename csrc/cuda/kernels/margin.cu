// The rows of margin_loss on CUDA: from the cosines q_c of a feature and all old prototypes
//
//   z_c = tau (q_c - margin),  loss = log(1 + sum_c exp(z_c)),  w_c = exp(z_c) / (1 + sum_c exp(z_c))
//
// A block takes a row of any length. The largest z is found first and taken out of all exponents, so nothing overflows.
#include "margin.h"

namespace janus::kernels {
namespace {

constexpr int kThreads = 128;  // a power of two, for the tree below

struct Largest {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

// The same result in every thread: a tree over shared memory [kThreads].
template <typename T, typename Op>
__device__ T reduce_block(T value, Op op, T* shared) {
  const int thread = static_cast<int>(threadIdx.x);
  shared[thread] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) shared[thread] = op(shared[thread], shared[thread + half]);
  }
  __syncthreads();
  const T result = shared[0];
  __syncthreads();  // nobody writes to `shared` again before all have read
  return result;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) weigh_rows_kernel(T* cosines, T* losses, int64_t columns, T margin,
                                                              T temperature) {
  __shared__ T shared[kThreads];
  T* row = cosines + blockIdx.x * columns;
  T top = 0;  // the hinge's own zero takes part in the maximum; a NaN does not, but reaches the sum
  for (int64_t c = threadIdx.x; c < columns; c += kThreads) top = Largest{}(top, temperature * (row[c] - margin));
  top = reduce_block(top, Largest{}, shared);

  T sum = threadIdx.x == 0 ? exp(-top) : T{0};
  for (int64_t c = threadIdx.x; c < columns; c += kThreads) {
    row[c] = exp(temperature * (row[c] - margin) - top);
    sum += row[c];
  }
  sum = reduce_block(sum, Sum{}, shared);

  for (int64_t c = threadIdx.x; c < columns; c += kThreads) row[c] /= sum;
  if (threadIdx.x == 0) losses[blockIdx.x] = top + log(sum);
}

}  // namespace

template <typename T>
cudaError_t margin_weigh_rows(T* cosines, T* losses, int64_t rows, int64_t columns, double margin, double temperature,
                              cudaStream_t stream) {
  weigh_rows_kernel<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(
      cosines, losses, columns, static_cast<T>(margin), static_cast<T>(temperature));
  return cudaGetLastError();
}

template cudaError_t margin_weigh_rows(float*, float*, int64_t, int64_t, double, double, cudaStream_t);
template cudaError_t margin_weigh_rows(double*, double*, int64_t, int64_t, double, double, cudaStream_t);

}  // namespace janus::kernels
