// rectify_ on CUDA: all layers in four launches (kernels/rectify.cu). Ranks above 64 and float64 take the general path
// of rectified.h, layer by layer.
//
// Pointers and sizes of the layers travel as kernel parameters: no copy to the device, hence no host memory that must
// outlive the call, nothing that waits, and a call that a CUDA graph can capture. So the host learns that A V is not
// zero only at a later call, from a place in its memory where the kernels note it (Findings). The general path waits
// for the norms, and cannot be captured under "exact".
#include "rectify.h"

#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <atomic>
#include <map>
#include <mutex>
#include <new>

#include "kernels/rectify.h"
#include "precision.h"

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
        .inverse_scale = static_cast<float>(1 / layers.scale[i]),
    });
  }
}

[[noreturn]] void refuse_unsafe(int64_t layer, double inside, double whole, const char* consequence) {
  TORCH_CHECK_VALUE(false, "rectify_: layer ", layer, ": rectify='exact' presumes A V = 0, got |A V| = ", inside,
                    " with |A| = ", whole, consequence);
}

// Where the kernels of a device note a layer whose A V is not zero: pinned memory that they write and the host reads,
// made at the first call and kept for the process.
class Findings {
 public:
  static kernels::Finding* of_current_device() {
    static Findings findings;
    const std::lock_guard<std::mutex> lock(findings.mutex_);
    kernels::Finding*& finding = findings.by_device_[c10::cuda::current_device()];
    if (finding == nullptr) {
      void* memory = nullptr;
      const c10::cuda::CUDAStreamCaptureModeGuard allowed(
          cudaStreamCaptureModeRelaxed);  // the first call may be captured
      C10_CUDA_CHECK(cudaHostAlloc(&memory, sizeof(kernels::Finding), cudaHostAllocMapped | cudaHostAllocPortable));
      finding = new (memory) kernels::Finding{kernels::kNothingFound, 0, 0};
    }
    return finding;
  }

 private:
  std::mutex mutex_;
  std::map<c10::DeviceIndex, kernels::Finding*> by_device_;
};

// Raises what an earlier call found, once.
void raise_finding(kernels::Finding* finding) {
  std::atomic_ref<int> noted(finding->layer);
  const int layer = noted.load(std::memory_order_acquire);
  if (layer < 0) return;
  const kernels::Finding found = *finding;
  noted.store(kernels::kNothingFound, std::memory_order_release);
  refuse_unsafe(layer, found.inside, found.whole,
                "; found in an earlier call, which set the gradients of these factors to 0");
}

// |A V| <= tolerance |A| in all layers, of which the host waits for the norms.
void check_safe_factors(const Layers& layers, const Indices& all) {
  Indices indices;
  std::vector<Tensor> factors, products;
  for (int64_t i : all) {
    if (is_empty(layers.basis[i]) || layers.A[i].numel() == 0) continue;
    indices.push_back(i);
    factors.push_back(layers.A[i]);
    products.push_back(at::matmul(layers.A[i], layers.basis[i]));
  }
  if (factors.empty()) return;
  const auto on_host = [](const std::vector<Tensor>& tensors) {
    return at::stack(at::_foreach_norm(tensors)).to(at::kCPU, at::kDouble);
  };
  const Tensor inside = on_host(products), whole = on_host(factors);
  for (size_t j = 0; j < indices.size(); ++j) {
    const double in = inside.const_data_ptr<double>()[j], of = whole.const_data_ptr<double>()[j];
    if (in > kBasisTolerance * of) refuse_unsafe(indices[j], in, of, "");
  }
}

void rectify_general(const Layers& layers, const Indices& indices, Rectification options) {
  if (options.mode == "exact") check_safe_factors(layers, indices);
  for (int64_t i : indices) {
    options.scale = layers.scale[i];
    const auto [dA, dB] =
        rectified(layers.A[i], layers.B[i], layers.grad_A[i], layers.grad_B[i], layers.basis[i], options);
    layers.grad_A[i].copy_(dA);
    layers.grad_B[i].copy_(dB);
  }
}

void rectify_by_kernels(const std::vector<kernels::Layer>& batch, const at::TensorOptions& like,
                        const Rectification& options, kernels::Finding* finding) {
  const auto count = static_cast<int64_t>(batch.size());
  const Tensor workspace = at::empty({kernels::rectify_workspace(batch.data(), count)}, like.dtype(at::kFloat));
  const kernels::RectifyOptions numbers{
      .damping = static_cast<float>(options.damping),
      .floor = static_cast<float>(kDampingFloor),
      .share = static_cast<float>(options.share),
      .tolerance = static_cast<float>(kBasisTolerance),
      .finding = finding,
      .balance = options.balance,
      .only_project = options.mode == "project",
  };
  C10_CUDA_CHECK(kernels::rectify(batch.data(), count, numbers, workspace.mutable_data_ptr<float>(),
                                  c10::cuda::getCurrentCUDAStream()));
}

void rectify_layers(const Layers& layers, const Indices& indices, const Rectification& options) {
  std::vector<kernels::Layer> batch;
  Indices others;
  for (int64_t i : indices) {
    if (fits_kernel(layers.A[i]))
      append_targets(batch, layers, i);
    else
      others.push_back(i);
  }
  if (!others.empty()) rectify_general(layers, others, options);
  if (batch.empty()) return;
  for (int64_t i : indices) {  // of the others it has moved on
    if (fits_kernel(layers.A[i])) bump_version(layers.grad_A[i]);
    if (fits_kernel(layers.A[i]) && options.mode != "project") bump_version(layers.grad_B[i]);
  }
  rectify_by_kernels(batch, layers.A[indices.front()].options(), options, Findings::of_current_device());
}

void rectify_(at::TensorList A, at::TensorList B, at::TensorList grad_A, at::TensorList grad_B, at::TensorList basis,
              at::ArrayRef<double> scale, std::string_view rectify, double damping, double share, bool balance) {
  check_rectify_batch(A, B, grad_A, grad_B, basis, scale, rectify, damping, share);
  const Layers layers{A, B, grad_A, grad_B, basis, scale};
  check_on_cuda(A);
  if (rectify == "none") return;
  const FullFloat32 precision;
  const auto devices = by_device(A);
  for (const auto& [device, indices] : devices) {  // before anything is written on any of them
    const c10::cuda::CUDAGuard guard(device);
    raise_finding(Findings::of_current_device());
  }
  for (const auto& [device, indices] : devices) {
    const c10::cuda::CUDAGuard guard(device);
    rectify_layers(layers, indices, {1, rectify, damping, share, balance});
  }
}

}  // namespace

std::pair<Tensor, Tensor> rectified_on_device(const Tensor& A, const Tensor& B, const Tensor& grad_A,
                                              const Tensor& grad_B, const OptionalTensor& basis,
                                              const Rectification& options) {
  if (options.mode == "none" || A.numel() == 0 || !fits_kernel(A))
    return rectified(A, B, grad_A, grad_B, basis, options);
  const Tensor V = is_empty(basis) ? at::empty({A.size(-1), 0}, A.options()) : *basis;
  std::vector<kernels::Layer> batch;
  append_targets(batch, {A, B, grad_A, grad_B, V, options.scale}, 0);
  rectify_by_kernels(batch, A.options(), options, nullptr);
  return {grad_A, grad_B};
}

}  // namespace janus

TORCH_LIBRARY_IMPL(janus_ext, CUDA, m) {
  m.impl("rectify_", TORCH_FN(janus::rectify_));
}
