// The rows of margin_loss on CUDA: from the products f . p_c of a feature and all old prototypes, with q_c = f . p_c /
// |f|
//
//   z_c = tau (q_c - margin),  loss = log(1 + sum_c exp(z_c)),  w_c = exp(z_c) / (1 + sum_c exp(z_c))
//
// the loss, the weights w_c / (N |f|) and their sum along f, sum_c w_c q_c / (N |f|^2). A block takes a row of any
// length. The largest z is found first and taken out of all exponents, so nothing overflows.
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

// a b, rounded: fused with what comes after it, the z that was found largest and the z it is taken from would differ.
__device__ float product(float a, float b) {
  return __fmul_rn(a, b);
}
__device__ double product(double a, double b) {
  return __dmul_rn(a, b);
}

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
__global__ void __launch_bounds__(kThreads) weigh_rows_kernel(T* products, const T* norm, T* losses, T* along,
                                                              int64_t columns, T margin, T temperature) {
  __shared__ T shared[kThreads];
  T* row = products + blockIdx.x * columns;
  const T length = norm[blockIdx.x];
  const auto z = [&](T inner) { return product(temperature, inner / length - margin); };
  T top = 0;  // the hinge's own zero takes part in the maximum; a NaN does not, but reaches the sum
  for (int64_t c = threadIdx.x; c < columns; c += kThreads) top = Largest{}(top, z(row[c]));
  top = reduce_block(top, Largest{}, shared);

  T sum = threadIdx.x == 0 ? exp(-top) : T{0}, inside = 0;
  for (int64_t c = threadIdx.x; c < columns; c += kThreads) {
    const T weight = exp(z(row[c]) - top);
    sum += weight;
    inside += weight * row[c] / length;
    row[c] = weight;
  }
  sum = reduce_block(sum, Sum{}, shared);
  inside = reduce_block(inside, Sum{}, shared);

  const T gain = sum * length * static_cast<T>(gridDim.x);
  for (int64_t c = threadIdx.x; c < columns; c += kThreads) row[c] /= gain;
  if (threadIdx.x > 0) return;
  losses[blockIdx.x] = top + log(sum);
  along[blockIdx.x] = inside / gain / length;
}

}  // namespace

template <typename T>
cudaError_t margin_weigh_rows(const MarginRows<T>& rows, double margin, double temperature, cudaStream_t stream) {
  weigh_rows_kernel<<<static_cast<unsigned>(rows.count), kThreads, 0, stream>>>(
      rows.products, rows.norm, rows.losses, rows.along, rows.columns, static_cast<T>(margin),
      static_cast<T>(temperature));
  return cudaGetLastError();
}

template cudaError_t margin_weigh_rows(const MarginRows<float>&, double, double, cudaStream_t);
template cudaError_t margin_weigh_rows(const MarginRows<double>&, double, double, cudaStream_t);

}  // namespace janus::kernels
