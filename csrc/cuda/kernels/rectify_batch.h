// What the kernels of rectify_ share: the layers of one launch, the workspace they meet in, and the access to vectors.
#pragma once

#include <cstdint>

#include "rectify.h"

namespace janus::kernels {

inline constexpr int kThreads = 256;
inline constexpr int kTile = 32;          // vectors in shared memory at a time
inline constexpr int kPitch = kTile + 1;  // of a tile [r][kPitch]: odd, against bank conflicts

struct Batch {
  Layer layers[kLayersPerLaunch];
  RectifyOptions options;
  int64_t pitch;  // floats of the workspace from one layer to the next
};
static_assert(sizeof(Batch) + sizeof(float*) <= 4096, "kernel parameters");

// A layer's part of the workspace is its Algebra, then M [2r, k].
struct Algebra {  // of one layer, [r, r] each, but for the numbers tr(A A^T)/r and tr(B^T B)/r
  float inverse_A[kMaxRank * kMaxRank], inverse_B[kMaxRank * kMaxRank], common[kMaxRank * kMaxRank];
  float mean_A, mean_B;
  bool unsafe;  // A V is not zero
};

inline __device__ Algebra& algebra_of(float* workspace, const Batch& batch, int layer) {
  return *reinterpret_cast<Algebra*>(workspace + layer * batch.pitch);
}

inline __device__ float* products_of(float* workspace, const Batch& batch, int layer) {
  return reinterpret_cast<float*>(&algebra_of(workspace, batch, layer) + 1);
}

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
__device__ T& at(const Vectors<T>& vectors, int64_t vector, int64_t component) {
  return vectors.data[vector * vectors.vector_stride + component * vectors.component_stride];
}

struct Sizes {  // the largest of a batch
  int rank = 0, k = 0;
  int64_t n = 0, m = 0;
};

inline unsigned blocks(int64_t size, int64_t each) {
  return static_cast<unsigned>((size + each - 1) / each);
}

// g_A <- g_A P for all layers of the batch, and M left in the workspace: rectify_projection.cu.
void launch_projection(const Batch& batch, unsigned count, const Sizes& sizes, float* workspace, cudaStream_t stream);

}  // namespace janus::kernels
