// rectify_ on CUDA: all layers in four launches (kernels/rectify.cu). Ranks above 64 and float64 take the general path
// of rectified.h, layer by layer.
//
// Pointers and sizes of the layers travel as kernel parameters: no copy to the device, hence no host memory that must
// outlive the call, nothing that waits, and a call that a CUDA graph can capture.
#include "kernels/rectify.h"

#include <ATen/ops/_assert_async.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/any.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/stack.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <map>

#include "precision.h"
#include "rectified.h"

namespace janus {
namespace {

using Indices = std::vector<int64_t>;

struct Layers {
  at::TensorList A, B, grad_A, grad_B, basis;
  at::ArrayRef<double> scale;
};

void check_on_cuda(at::TensorList A) {
  for (size_t i = 0; i < A.size(); ++i)
    TORCH_CHECK_VALUE(A[i].is_cuda(), "rectify_: layer ", i, ": A must be on a CUDA device like other layers, got ",
                      A[i].device().str());
}

std::map<c10::DeviceIndex, Indices> by_device(at::TensorList tensors) {
  std::map<c10::DeviceIndex, Indices> indices;
  for (size_t i = 0; i < tensors.size(); ++i) indices[tensors[i].device().index()].push_back(static_cast<int64_t>(i));
  return indices;
}

bool fits_kernel(const Tensor& A) {
  return A.scalar_type() == at::kFloat && A.size(-2) <= kernels::kMaxRank;
}

// Target t of M [.., .., ..] or [.., ..], seen as vectors along dimension `along`.
template <typename T>
kernels::Vectors<T> vectors(T* data, const Tensor& M, int64_t t, int64_t along) {
  return {data + (M.dim() == 3 ? t * M.stride(0) : 0), M.stride(along), M.stride(along == -1 ? -2 : -1)};
}

void append_targets(std::vector<kernels::Layer>& batch, const Layers& layers, int64_t i) {
  const Tensor &A = layers.A[i], &B = layers.B[i], &grad_A = layers.grad_A[i], &grad_B = layers.grad_B[i];
  const Tensor& V = layers.basis[i];
  const int64_t targets = A.dim() == 3 ? A.size(0) : 1;
  for (int64_t t = 0; t < targets; ++t) {
    batch.push_back({
        .A = vectors(A.const_data_ptr<float>(), A, t, -1),
        .B = vectors(B.const_data_ptr<float>(), B, t, -2),
        .grad_A = vectors(grad_A.mutable_data_ptr<float>(), grad_A, t, -1),
        .grad_B = vectors(grad_B.mutable_data_ptr<float>(), grad_B, t, -2),
        .basis = vectors(V.const_data_ptr<float>(), V, 0, -2),
        .n = A.size(-1),
        .m = B.size(-2),
        .rank = static_cast<int>(A.size(-2)),
        .k = static_cast<int>(V.size(-1)),
        .index = static_cast<int>(i),
        .gain = static_cast<float>(1 / (layers.scale[i] * layers.scale[i])),
    });
  }
}

// |A V| <= tolerance |A|, asserted on the device: reading the norms here would make the host wait at every step. The
// price is that the message cannot hold them, and that a failure ends the process's use of the device.
void assert_safe_factors(const Layers& layers, const Indices& indices) {
  std::vector<Tensor> factors, products;
  for (int64_t i : indices) {
    if (is_empty(layers.basis[i]) || layers.A[i].numel() == 0) continue;
    factors.push_back(layers.A[i]);
    products.push_back(at::matmul(layers.A[i], layers.basis[i]));
  }
  if (factors.empty()) return;
  const Tensor inside = at::stack(at::_foreach_norm(products)), whole = at::stack(at::_foreach_norm(factors));
  const Tensor wrong = (inside > kBasisTolerance * whole).any();
  at::_assert_async(wrong.logical_not(),
                    "rectify_: rectify='exact' presumes A V = 0, got |A V| > 1e-3 |A| in at least one layer");
}

void rectify_general(const Layers& layers, const Indices& indices, Rectification options) {
  if (options.mode == "exact") assert_safe_factors(layers, indices);
  for (int64_t i : indices) {
    options.scale = layers.scale[i];
    const auto [dA, dB] =
        rectified(layers.A[i], layers.B[i], layers.grad_A[i], layers.grad_B[i], layers.basis[i], options);
    layers.grad_A[i].copy_(dA);
    layers.grad_B[i].copy_(dB);
  }
}

void rectify_by_kernels(const std::vector<kernels::Layer>& batch, const at::TensorOptions& like,
                        const Rectification& options) {
  const auto count = static_cast<int64_t>(batch.size());
  const Tensor workspace = at::empty({kernels::rectify_workspace(batch.data(), count)}, like.dtype(at::kFloat));
  const kernels::RectifyOptions numbers{
      .damping = static_cast<float>(options.damping),
      .floor = static_cast<float>(kDampingFloor),
      .share = static_cast<float>(options.share),
      .tolerance = static_cast<float>(kBasisTolerance),
      .balance = options.balance,
      .only_project = options.mode == "project",
  };
  C10_CUDA_CHECK(kernels::rectify(batch.data(), count, numbers, workspace.mutable_data_ptr<float>(),
                                  c10::cuda::getCurrentCUDAStream()));
}

void rectify_on_device(const Layers& layers, const Indices& indices, const Rectification& options) {
  std::vector<kernels::Layer> batch;
  Indices others;
  for (int64_t i : indices) {
    if (fits_kernel(layers.A[i]))
      append_targets(batch, layers, i);
    else
      others.push_back(i);
  }
  if (!others.empty()) rectify_general(layers, others, options);
  if (!batch.empty()) rectify_by_kernels(batch, layers.A[indices.front()].options(), options);
}

void rectify_(at::TensorList A, at::TensorList B, at::TensorList grad_A, at::TensorList grad_B, at::TensorList basis,
              at::ArrayRef<double> scale, std::string_view rectify, double damping, double share, bool balance) {
  check_rectify_batch(A, B, grad_A, grad_B, basis, scale, rectify, damping, share);
  const Layers layers{A, B, grad_A, grad_B, basis, scale};
  check_on_cuda(A);
  if (rectify == "none") return;
  const FullFloat32 precision;
  for (const auto& [device, indices] : by_device(A)) {
    const c10::cuda::CUDAGuard guard(device);
    rectify_on_device(layers, indices, {1, rectify, damping, share, balance});
  }
}

}  // namespace
}  // namespace janus

TORCH_LIBRARY_IMPL(janus_ext, CUDA, m) {
  m.impl("rectify_", TORCH_FN(janus::rectify_));
}
