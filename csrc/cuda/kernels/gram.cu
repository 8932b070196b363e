// gram_update_ on CUDA: C <- decay C + X^T X for row-major X [N, n] and C [n, n].
//
// The product is symmetric, so block columns are computed down to their diagonal block only, by cuBLAS, and the upper
// triangle is then mirrored: with b block columns (b + 1) / (2 b) of the multiplications, and a bit-symmetric result.
// Each element of the upper triangle lies in exactly one block, so it decays exactly once; what the lower triangle
// holds is never read.
#include <algorithm>
#include <cfloat>

#include "gram.h"

namespace janus::kernels {
namespace {

constexpr int64_t kBlock = 256;  // columns a block: whole tensor-core tiles, and wide enough to fill a product

constexpr int kTile = 32;  // mirrored tile, kTile x kTile elements by kTile x kTileRows threads
constexpr int kTileRows = 8;

int64_t element_size(cudaDataType_t type) {
  switch (type) {
    case CUDA_R_64F:
      return 8;
    case CUDA_R_32F:
      return 4;
    default:
      return 2;
  }
}

// A tile on or above the diagonal is read row by row, turned in shared memory and written row by row, so both sides
// are coalesced; the extra column keeps the turned reads free of bank conflicts.
template <typename T>
__global__ void __launch_bounds__(kTile* kTileRows) mirror_kernel(T* gram, int64_t n) {
  __shared__ T tile[kTile][kTile + 1];
  const int64_t row = static_cast<int64_t>(blockIdx.y) * kTile, column = static_cast<int64_t>(blockIdx.x) * kTile;
  if (row > column) return;
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  for (int i = y; i < kTile; i += kTileRows)
    if (row + i < n && column + x < n) tile[i][x] = gram[(row + i) * n + column + x];
  __syncthreads();
  for (int i = y; i < kTile; i += kTileRows) {
    const int64_t to_row = column + i, to_column = row + x;
    if (to_row < n && to_column < to_row) gram[to_row * n + to_column] = tile[x][i];
  }
}

template <typename T>
cudaError_t launch_mirror(T* gram, int64_t n, cudaStream_t stream) {
  const auto tiles = static_cast<unsigned>((n + kTile - 1) / kTile);
  mirror_kernel<<<dim3(tiles, tiles), dim3(kTile, kTileRows), 0, stream>>>(gram, n);
  return cudaGetLastError();
}

}  // namespace

cublasStatus_t gram_upper_blocks(cublasHandle_t handle, const GramUpdate& update) {
  const bool wide = update.type == CUDA_R_64F;
  const auto gram_type = wide ? CUDA_R_64F : CUDA_R_32F;
  const auto compute = wide ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F;
  // With beta = 0 BLAS does not read C and would lose a NaN in it; a decay below float's range must not round to that.
  const float one = 1, decay = std::max(static_cast<float>(update.decay), FLT_MIN);
  const double wide_one = 1;
  const void* alpha = wide ? static_cast<const void*>(&wide_one) : &one;
  const void* beta = wide ? static_cast<const void*>(&update.decay) : &decay;
  const auto* x = static_cast<const char*>(update.x);
  auto* gram = static_cast<char*>(update.gram);
  for (int64_t begin = 0; begin < update.n; begin += kBlock) {
    const int64_t end = std::min(update.n, begin + kBlock);
    // C[0:end, begin:end] = X[:, 0:end]^T X[:, begin:end]. cuBLAS is column-major: it sees X as X^T and this block as
    // its transpose, (end - begin) x end, the product of X^T's rows begin..end and the transpose of its rows 0..end.
    const auto status = cublasGemmEx_64(handle, CUBLAS_OP_N, CUBLAS_OP_T, end - begin, end, update.rows, alpha,
                                        x + begin * element_size(update.type), update.type, update.stride, x,
                                        update.type, update.stride, beta, gram + begin * element_size(gram_type),
                                        gram_type, update.n, compute, CUBLAS_GEMM_DEFAULT);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
  }
  return CUBLAS_STATUS_SUCCESS;
}

cudaError_t gram_mirror(const GramUpdate& update, cudaStream_t stream) {
  if (update.type == CUDA_R_64F) return launch_mirror(static_cast<double*>(update.gram), update.n, stream);
  return launch_mirror(static_cast<float*>(update.gram), update.n, stream);
}

}  // namespace janus::kernels
