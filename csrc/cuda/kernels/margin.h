// The rows of margin_loss on the current device; see margin.cu. Torch-free.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace janus::kernels {

// cosines [rows, columns], contiguous: overwritten with the weights w. losses [rows]: log(1 + sum_c exp(z_c)).
template <typename T>
cudaError_t margin_weigh_rows(T* cosines, T* losses, int64_t rows, int64_t columns, double margin, double temperature,
                              cudaStream_t stream);

}  // namespace janus::kernels
