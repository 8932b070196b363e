// C <- decay C + X^T X on the current device, in two steps; see gram.cu. Torch-free.
#pragma once

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace janus::kernels {

struct GramUpdate {
  const void* x;        // [rows, n], row-major, `stride` elements from one row to the next
  cudaDataType_t type;  // of x: CUDA_R_16BF, CUDA_R_16F, CUDA_R_32F or CUDA_R_64F
  int64_t rows;
  int64_t stride;
  void* gram;  // [n, n], contiguous; float64 if x is, otherwise float32
  int64_t n;
  double decay;
};

// The blocks on and above the diagonal, on the handle's stream, in the handle's math mode.
cublasStatus_t gram_upper_blocks(cublasHandle_t handle, const GramUpdate& update);

// The strict lower triangle from the upper one.
cudaError_t gram_mirror(const GramUpdate& update, cudaStream_t stream);

}  // namespace janus::kernels
