// gram_update_ on CUDA: C <- decay C + X^T X for row-major X [N, n] and C [n, n].
//
// The product is symmetric, so cuBLAS forms block columns down to their diagonal block only: with b block columns
// (b + 1) / (2 b) of the multiplications. C has few tiles, though, and N is long: of 16-bit rows, which the tensor
// cores take fast, chunks are multiplied side by side, each into a partial sum, so that every multiprocessor has work.
// One kernel then adds the partial sums in a fixed order, decays C and writes both triangles: the result is symmetric
// to the bit, the same every time, and its rounding error grows with the length of a chunk. C's lower triangle is never
// read.
#include "gram.h"

#include <algorithm>

namespace janus::kernels {
namespace {

// Measured on an H100, 25216 rows; benchmarks/FLOORS.md has the figures.
constexpr int64_t kColumns = 256;       // a block column of float32 or float64, whose products are bound by arithmetic
constexpr int64_t kOneColumn = 512;     // up to here a 16-bit product is one block, beyond it has two block columns
constexpr int64_t kAlignment = 64;      // of a 16-bit block column: rows of the tensor cores' tiles
constexpr int64_t kChunkedWork = 6144;  // chunks times n: as many tiles as the device has room for
constexpr int64_t kLeastRows = 512;     // of a chunk
constexpr int64_t kMostChunks = 32;

constexpr int kTile = 32;  // gathered tile, kTile x kTile elements by kTile x kTileRows threads
constexpr int kTileRows = 8;
constexpr int kTurns = kTile / kTileRows;

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

// A tile on or above the diagonal is summed row by row, turned in shared memory and written row by row again, so that
// all accesses are coalesced; the extra column keeps the turned reads free of bank conflicts.
template <typename T>
__global__ void __launch_bounds__(kTile* kTileRows) gather_kernel(T* gram, const T* partials, int64_t n, int64_t chunks,
                                                                  T decay) {
  __shared__ T tile[kTile][kTile + 1];
  const int64_t row = static_cast<int64_t>(blockIdx.y) * kTile, column = static_cast<int64_t>(blockIdx.x) * kTile;
  if (row > column) return;
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  T sums[kTurns] = {};
#pragma unroll 4  // so many loads of each sum under way at a time
  for (int64_t c = 0; c < chunks; ++c) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int64_t i = row + y + turn * kTileRows, j = column + x;
      if (i <= j && j < n) sums[turn] += partials[(c * n + i) * n + j];
    }
  }
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int64_t i = row + y + turn * kTileRows, j = column + x;
    if (i <= j && j < n) tile[i - row][x] = gram[i * n + j] = decay * gram[i * n + j] + sums[turn];
  }
  __syncthreads();
  for (int i = y; i < kTile; i += kTileRows) {
    const int64_t to_row = column + i, to_column = row + x;
    if (to_row < n && to_column < to_row) gram[to_row * n + to_column] = tile[x][i];
  }
}

template <typename T>
cudaError_t launch_gather(const GramUpdate& update, const GramCut& cut, const void* partials, cudaStream_t stream) {
  const auto tiles = static_cast<unsigned>((update.n + kTile - 1) / kTile);
  gather_kernel<<<dim3(tiles, tiles), dim3(kTile, kTileRows), 0, stream>>>(static_cast<T*>(update.gram),
                                                                           static_cast<const T*>(partials), update.n,
                                                                           cut.chunks, static_cast<T>(update.decay));
  return cudaGetLastError();
}

struct Block {
  int64_t begin, end;  // columns of C; its rows are 0 .. end
};

// partials[i][0:end, begin:end] <- (or, `onto`, +=) X_i[:, 0:end]^T X_i[:, begin:end] for `count` chunks of `rows` rows
// from row `first` on. cuBLAS is column-major: it sees X as X^T and the block as its transpose, (end - begin) x end,
// the product of X^T's rows begin .. end and the transpose of its rows 0 .. end.
cublasStatus_t multiply(cublasHandle_t handle, const GramUpdate& update, const Block& block, int64_t first,
                        int64_t rows, int64_t count, bool onto, void* partials) {
  const bool wide = update.type == CUDA_R_64F;
  const auto type = wide ? CUDA_R_64F : CUDA_R_32F;
  const float numbers[] = {0, 1};
  const double wide_numbers[] = {0, 1};
  const auto number = [&](bool one) {
    return wide ? static_cast<const void*>(wide_numbers + one) : static_cast<const void*>(numbers + one);
  };
  const char* x = static_cast<const char*>(update.x) + first * update.stride * element_size(update.type);
  const char* columns = x + block.begin * element_size(update.type);
  char* out = static_cast<char*>(partials) + block.begin * element_size(type);
  const int64_t chunk = rows * update.stride;
  return cublasGemmStridedBatchedEx_64(handle, CUBLAS_OP_N, CUBLAS_OP_T, block.end - block.begin, block.end, rows,
                                       number(true), columns, update.type, update.stride, chunk, x, update.type,
                                       update.stride, chunk, number(onto), out, type, update.n, update.n * update.n,
                                       count, wide ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
}

}  // namespace

GramCut gram_cut(cudaDataType_t type, int64_t rows, int64_t n) {
  if (element_size(type) > 2) return {kColumns, 1};
  int64_t chunks = 1;  // a power of two, which batches mostly are multiples of
  while (chunks < kMostChunks && chunks * n < kChunkedWork && rows >= 2 * chunks * kLeastRows) chunks *= 2;
  const int64_t half = ((n + 1) / 2 + kAlignment - 1) / kAlignment * kAlignment;
  return {n <= kOneColumn ? n : half, chunks};
}

cublasStatus_t gram_partials(cublasHandle_t handle, const GramUpdate& update, const GramCut& cut, void* partials) {
  const int64_t rows = update.rows / cut.chunks, rest = update.rows % cut.chunks;
  for (int64_t begin = 0; begin < update.n; begin += cut.width) {
    const Block block{begin, std::min(update.n, begin + cut.width)};
    auto status = multiply(handle, update, block, 0, rows, cut.chunks, false, partials);
    if (status == CUBLAS_STATUS_SUCCESS && rest > 0)  // the last rows, onto the first chunk's sum
      status = multiply(handle, update, block, update.rows - rest, rest, 1, true, partials);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
  }
  return CUBLAS_STATUS_SUCCESS;
}

cudaError_t gram_gather(const GramUpdate& update, const GramCut& cut, const void* partials, cudaStream_t stream) {
  if (update.type == CUDA_R_64F) return launch_gather<double>(update, cut, partials, stream);
  return launch_gather<float>(update, cut, partials, stream);
}

}  // namespace janus::kernels
