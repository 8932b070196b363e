// Gradient Rectification of many layers at once on the current device; see rectify.cu. Torch-free.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace janus::kernels {

inline constexpr int kMaxRank = 64;
inline constexpr int kLayersPerLaunch = 26;  // a batch travels as kernel parameters, of which there are 4096 bytes

// A matrix, float32 at any strides, as vectors of some components: the n columns of A [r, n] or of its gradient, the m
// rows of B [m, r], the n rows of V [n, k].
template <typename T>
struct Vectors {
  T* data;
  int64_t vector_stride;
  int64_t component_stride;
};

struct Layer {
  Vectors<const float> A, B;
  Vectors<float> grad_A, grad_B;  // in: s B^T G and s G P A^T; out: rectified
  Vectors<const float> basis;
  int64_t n, m;
  int rank;             // from 1 to kMaxRank
  int k;                // 0: no basis
  int index;            // for the finding that A V is not zero
  float inverse_scale;  // 1 / s, twice on both factors unless they are balanced: 1 / s^2 may be no float
};

// A layer whose A V is not zero, in memory that host and device share: what the host reads there is from calls before.
struct Finding {
  int layer;            // its index, or one of the two below
  float inside, whole;  // |A V| and |A|, written before `layer` is
};
inline constexpr int kNothingFound = -1, kBeingWritten = -2;

struct RectifyOptions {
  float damping, floor;  // of the Gram matrices: see rectified.h
  float share;
  float tolerance;   // of |A V| / |A|: beyond it the layer's gradients are set to 0, and it is noted in `finding`
  Finding* finding;  // of the first such layer since the host cleared it; null: A V = 0 is not looked at
  bool balance;
  bool only_project;  // grad_A <- grad_A P, and nothing else is read or written
};

// Floats that `rectify` needs to work on: what it keeps of one layer, for as many layers as one launch takes.
int64_t rectify_workspace(const Layer* layers, int64_t count);

// Four launches for every kLayersPerLaunch layers, on `stream`: two for the products with V, if there is a V, and two
// for the rest, unless only_project. Nothing of `layers` is read after the call.
cudaError_t rectify(const Layer* layers, int64_t count, const RectifyOptions& options, float* workspace,
                    cudaStream_t stream);

}  // namespace janus::kernels
