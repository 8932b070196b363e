// Gradient Rectification on CUDA, by the kernels where a layer fits them and as rectified.h has it where not.
#pragma once

#include "rectified.h"

namespace janus {

// Results as `rectified` gives them, of one layer with A V = 0 or gradients made for "tangent": for a backward pass.
// Where the kernels take it, grad_A and grad_B are overwritten.
std::pair<Tensor, Tensor> rectified_on_device(const Tensor& A, const Tensor& B, const Tensor& grad_A,
                                              const Tensor& grad_B, const OptionalTensor& basis,
                                              const Rectification& options);

}  // namespace janus
