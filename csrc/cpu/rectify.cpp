// rectify_ on the CPU: the layers are independent, so they run side by side, each on one thread.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <torch/library.h>

#include "../precision.h"
#include "../rectified.h"

namespace janus {
namespace {

void check_safe_factor(int64_t layer, const Tensor& A, const Tensor& basis) {
  const double inside = at::matmul(A, basis).norm().item<double>(), whole = A.norm().item<double>();
  TORCH_CHECK_VALUE(!(inside > kBasisTolerance * whole), "rectify_: layer ", layer,
                    ": rectify='exact' presumes A V = 0, got |A V| = ", inside, " with |A| = ", whole);
}

void rectify_(at::TensorList A, at::TensorList B, at::TensorList grad_A, at::TensorList grad_B, at::TensorList basis,
              at::ArrayRef<double> scale, std::string_view rectify, double damping, double share, bool balance) {
  check_rectify_batch(A, B, grad_A, grad_B, basis, scale, rectify, damping, share);
  const FullFloat32 precision;
  const auto for_each_layer = [&](auto&& work) {
    at::parallel_for(0, static_cast<int64_t>(A.size()), 1, [&](int64_t begin, int64_t end) {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;  // worker threads start with gradients on
      for (int64_t i = begin; i < end; ++i) work(i);
    });
  };
  if (rectify == "exact") {  // all layers are looked at before any gradient is written
    for_each_layer([&](int64_t i) {
      if (!is_empty(basis[i])) check_safe_factor(i, A[i], basis[i]);
    });
  }
  for_each_layer([&](int64_t i) {
    const auto [dA, dB] =
        rectified(A[i], B[i], grad_A[i], grad_B[i], basis[i], {scale[i], rectify, damping, share, balance});
    grad_A[i].copy_(dA);
    grad_B[i].copy_(dB);
  });
}

}  // namespace
}  // namespace janus

TORCH_LIBRARY_IMPL(janus_ext, CPU, m) {
  m.impl("rectify_", TORCH_FN(janus::rectify_));
}
