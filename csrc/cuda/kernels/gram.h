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

// How the product is cut: block columns of C, and chunks of rows, each of which has a partial sum of its own.
struct GramCut {
  int64_t width;
  int64_t chunks;
};

GramCut gram_cut(cudaDataType_t type, int64_t rows, int64_t n);

// partials [chunks, n, n], of gram's type <- X_chunk^T X_chunk on and above the diagonal blocks, on the handle's
// stream, in its math mode. The rest of it stays as it is.
cublasStatus_t gram_partials(cublasHandle_t handle, const GramUpdate& update, const GramCut& cut, void* partials);

// C <- decay C + the sum of the partials, both triangles. C's lower one is not read.
cudaError_t gram_gather(const GramUpdate& update, const GramCut& cut, const void* partials, cudaStream_t stream);

}  // namespace janus::kernels
