// rectify_ on the CPU: the layers are independent, so they run side by side, each on one thread. Their gradients are
// written when all layers have passed their check.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <torch/library.h>

#include "../precision.h"
#include "../rectified.h"

namespace janus {
namespace {

// g_A P for "exact", which presumes A V = 0: one product with V serves the check and the projection of all targets.
Tensor checked_projection(int64_t layer, const Tensor& A, const Tensor& grad_A, const Tensor& basis) {
  const int64_t r = A.size(-2);
  const Tensor products = at::matmul(at::cat({A, grad_A}, -2), basis);
  const double inside = products.narrow(-2, 0, r).norm().item<double>(), whole = A.norm().item<double>();
  TORCH_CHECK_VALUE(!(inside > kBasisTolerance * whole), "rectify_: layer ", layer,
                    ": rectify='exact' presumes A V = 0, got |A V| = ", inside, " with |A| = ", whole);
  return at::matmul(products.narrow(-2, r, r), basis.mT()).neg_().add_(grad_A);
}

void rectify_(at::TensorList A, at::TensorList B, at::TensorList grad_A, at::TensorList grad_B, at::TensorList basis,
              at::ArrayRef<double> scale, std::string_view rectify, double damping, double share, bool balance) {
  check_rectify_batch(A, B, grad_A, grad_B, basis, scale, rectify, damping, share);
  if (rectify == "none") return;
  const FullFloat32 precision;
  const auto count = static_cast<int64_t>(A.size());
  std::vector<std::pair<Tensor, Tensor>> results(count);
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;  // worker threads start with gradients on
    for (int64_t i = begin; i < end; ++i) {
      const Rectification options{scale[i], rectify, damping, share, balance};
      results[i] =
          rectify == "exact" && !is_empty(basis[i])
              ? closest_update(A[i], B[i], checked_projection(i, A[i], grad_A[i], basis[i]), grad_B[i], options)
              : rectified(A[i], B[i], grad_A[i], grad_B[i], basis[i], options);
    }
  });
  for (int64_t i = 0; i < count; ++i) {
    grad_A[i].copy_(results[i].first);
    grad_B[i].copy_(results[i].second);
  }
}

}  // namespace
}  // namespace janus

TORCH_LIBRARY_IMPL(janus_ext, CPU, m) {
  m.impl("rectify_", TORCH_FN(janus::rectify_));
}
