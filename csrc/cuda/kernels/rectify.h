// Gradient Rectification of many layers at once on the current device; see rectify.cu. Torch-free.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace janus::kernels {

inline constexpr int kMaxRank = 64;
inline constexpr int kLayersPerLaunch = 32;  // a batch travels as kernel parameters, of which there are 4096 bytes

// A factor or its gradient, float32 at any strides, as `count` vectors of r components: the n columns of A [r, n], the
// m rows of B [m, r].
template <typename T>
struct Vectors {
  T* data;
  int64_t vector_stride;
  int64_t component_stride;
};

struct Layer {
  Vectors<const float> A, B;
  Vectors<float> grad_A, grad_B;  // in: s B^T G P and s G P A^T; out: rectified
  int64_t n, m;
  int rank;    // from 1 to kMaxRank
  float gain;  // 1 / s^2, of both factors unless they are balanced
};

struct RectifyOptions {
  float damping, floor;  // of the Gram matrices: see rectified.h
  float share;
  bool balance;
};

// Floats that `rectify` needs to work on: what it keeps of one layer, for as many layers as one launch takes.
int64_t rectify_workspace(int64_t layers);

// Two launches for every kLayersPerLaunch layers, on `stream`. Nothing of `layers` is read after the call.
cudaError_t rectify(const Layer* layers, int64_t count, const RectifyOptions& options, float* workspace,
                    cudaStream_t stream);

}  // namespace janus::kernels
