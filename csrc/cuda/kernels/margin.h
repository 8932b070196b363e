// The rows of margin_loss on the current device; see margin.cu. Torch-free.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace janus::kernels {

template <typename T>
struct MarginRows {
  T* products;    // [count, columns], contiguous; in: f . p_c; out: w_c / (count |f|)
  const T* norm;  // [count]: |f|, positive
  T* losses;      // [count]: log(1 + sum_c exp(z_c))
  T* along;       // [count]: sum_c w_c q_c / (count |f|^2)
  int64_t count, columns;
};

// One launch on `stream`.
template <typename T>
cudaError_t margin_weigh_rows(const MarginRows<T>& rows, double margin, double temperature, cudaStream_t stream);

}  // namespace janus::kernels
