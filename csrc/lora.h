// Forward and backward of an adapted linear map, device-independent: every product is ATen's, on the tensors' device.
//
//   y = x W^T + b,  y[off_i : off_i + m] += s (x A_i^T) B_i^T,   A_s = A P in place of A for "exact"
//
// A [g, r, n], B [g, m, r]; one x A^T product serves all g targets, and s B A is never formed. In those products r is
// padded_rank's.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <tuple>
#include <vector>

#include "checks.h"
#include "precision.h"
#include "rectified.h"

namespace janus {

using Triple = std::tuple<Tensor, Tensor, Tensor>;

inline Tensor rows_of(const Tensor& x) {
  return x.reshape({-1, x.size(-1)});
}

// `factor` in the dtype of the big products, zeros beyond its end along `dim`.
inline Tensor padded(const Tensor& factor, int64_t dim, at::ScalarType type) {
  auto shape = factor.sizes().vec();
  shape[dim] = padded_rank(factor.size(dim), type);
  if (shape[dim] == factor.size(dim)) return factor.to(type);
  Tensor wide = at::zeros(shape, factor.options().dtype(type));
  wide.narrow(dim, 0, factor.size(dim)).copy_(factor);
  return wide;
}

// A's targets on top of each other, [g r, n].
inline Tensor stacked(const Tensor& A, at::ScalarType type) {
  return padded(A, 1, type).reshape({-1, A.size(-1)});
}

inline std::vector<int64_t> slice_offsets(at::IntArrayRef targets, int64_t m) {
  std::vector<int64_t> offsets;
  for (auto target : targets) offsets.push_back(target * m);
  return offsets;
}

// y, x A_s^T [..., g r] and A_s [g, r, n].
inline Triple lora_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& A,
                           const Tensor& B, const OptionalTensor& basis, double scale, std::string_view rectify,
                           at::IntArrayRef offsets) {
  const int64_t r = padded_rank(A.size(1), x.scalar_type()), m = B.size(1);
  Tensor effective;
  {
    FullFloat32 guard;
    effective = rectify == "exact" && !is_empty(basis) ? project(A, basis) : A.clone(at::MemoryFormat::Contiguous);
  }
  Tensor y = at::linear(x, weight, bias);
  const Tensor rows = rows_of(x), y_rows = y.view({-1, y.size(-1)});
  const Tensor xA = at::mm(rows, stacked(effective, x.scalar_type()).t()), wide_B = padded(B, 2, x.scalar_type());
  for (size_t i = 0; i < offsets.size(); ++i) {
    const auto column = static_cast<int64_t>(i);
    y_rows.narrow(1, offsets[i], m).addmm_(xA.narrow(1, column * r, r), wide_B[column].t(), /*beta=*/1, scale);
  }
  auto shape = x.sizes().vec();
  shape.back() = xA.size(1);
  return {y, xA.view(shape), effective};
}

// dL/dx (empty unless need_x) and the gradients of A and B, by `rectify_gradients`, which is `rectified` or a device's
// form of it.
template <auto rectify_gradients>
Triple lora_backward(const Tensor& grad_y, const Tensor& x, const Tensor& xA, const Tensor& effective,
                     const Tensor& weight, const Tensor& A, const Tensor& B, const OptionalTensor& basis, double scale,
                     std::string_view rectify, double damping, double share, bool balance, at::IntArrayRef offsets,
                     bool need_x) {
  check_lora_backward(grad_y, x, xA, effective, weight, A, B, basis, scale, rectify, damping, share, offsets);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;  // out= refuses what requires a gradient
  const auto type = x.scalar_type();
  const int64_t g = A.size(0), r = padded_rank(A.size(1), type), m = B.size(1);
  const Tensor gy = rows_of(grad_y), rows = rows_of(x), wide_B = padded(B, 2, type);
  const Tensor through = at::empty({gy.size(0), g * r}, x.options());  // s G_i B_i, per target
  for (int64_t i = 0; i < g; ++i) {
    Tensor slice = through.narrow(1, i * r, r);
    at::mm_out(slice, gy.narrow(1, offsets[i], m), wide_B[i]);
  }
  if (scale != 1) through.mul_(scale);
  Tensor grad_x = at::empty({0}, x.options());
  if (need_x) grad_x = at::mm(gy, weight).addmm_(through, stacked(effective, type)).view(x.sizes());
  const Tensor wide_grad_A = at::mm(through.t(), rows).view({g, r, rows.size(1)});
  const Tensor grad_A = at::empty(A.sizes(), A.options()).copy_(wide_grad_A.narrow(1, 0, A.size(1)));

  FullFloat32 guard;
  Tensor inner = rows_of(xA);
  if (rectify == "tangent" && !is_empty(basis)) {
    inner = at::mm(rows, stacked(project(A, basis), type).t());  // G P A^T needs only x (A P)^T, not G V
  }
  const Tensor grad_B = at::empty(B.sizes(), B.options());
  for (int64_t i = 0; i < g; ++i) {
    const Tensor wide_grad_B = at::mm(gy.narrow(1, offsets[i], m).t(), inner.narrow(1, i * r, r));
    grad_B[i].copy_(wide_grad_B.narrow(1, 0, B.size(2)));
  }
  if (scale != 1) grad_B.mul_(scale);
  const Rectification options{scale, rectify, damping, share, balance};
  const auto [dA, dB] = rectify_gradients(effective, B, grad_A, grad_B, basis, options);
  return {grad_x, dA, dB};
}

inline Triple lora_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& A,
                          const Tensor& B, const OptionalTensor& basis, double scale, std::string_view rectify,
                          double damping, double share, bool /*balance*/, bool /*defer*/) {
  check_lora_linear(x, weight, bias, A, B, basis, scale, rectify, damping, share);
  return lora_forward(x, weight, bias, A.unsqueeze(0), B.unsqueeze(0), basis, scale, rectify, {0});
}

inline Triple lora_qkv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& A,
                       const Tensor& B, const OptionalTensor& basis, double scale, std::string_view rectify,
                       double damping, double share, bool /*balance*/, bool /*defer*/, at::IntArrayRef targets) {
  check_lora_qkv(x, weight, bias, A, B, basis, scale, rectify, damping, share, targets);
  return lora_forward(x, weight, bias, A, B, basis, scale, rectify, slice_offsets(targets, B.size(1)));
}

}  // namespace janus
