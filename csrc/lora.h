// Forward and backward of an adapted linear map, device-independent: every product is ATen's, on the tensors' device.
//
//   y = x W^T + b,  y[off_i : off_i + m] += s (x A_i^T) B_i^T,   A_s = A P in place of A for "exact"
//
// A [g, r, n], B [g, m, r]; one x A^T product serves all g targets, and s B A is never formed.
#pragma once

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

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

// A's targets on top of each other, in the dtype of the big products.
inline Tensor stacked(const Tensor& A, at::ScalarType type) {
  return A.reshape({-1, A.size(-1)}).to(type);
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
  const int64_t r = A.size(1), m = B.size(1);
  Tensor effective;
  {
    FullFloat32 guard;
    effective = rectify == "exact" && !is_empty(basis) ? project(A, basis) : A.clone();
  }
  Tensor y = at::linear(x, weight, bias);
  const Tensor rows = rows_of(x), y_rows = y.view({-1, y.size(-1)});
  const Tensor xA = at::mm(rows, stacked(effective, x.scalar_type()).t());
  for (size_t i = 0; i < offsets.size(); ++i) {
    const auto column = static_cast<int64_t>(i);
    y_rows.narrow(1, offsets[i], m)
        .addmm_(xA.narrow(1, column * r, r), B[column].to(x.scalar_type()).t(), /*beta=*/1, scale);
  }
  auto shape = x.sizes().vec();
  shape.back() = xA.size(1);
  return {y, xA.view(shape), effective};
}

// dL/dx (empty unless need_x) and the rectified gradients of A and B.
inline Triple lora_backward(const Tensor& grad_y, const Tensor& x, const Tensor& xA, const Tensor& effective,
                            const Tensor& weight, const Tensor& A, const Tensor& B, const OptionalTensor& basis,
                            double scale, std::string_view rectify, double damping, double share, bool balance,
                            at::IntArrayRef offsets, bool need_x) {
  check_lora_backward(grad_y, x, xA, effective, weight, A, B, basis, scale, rectify, damping, share, offsets);
  const auto type = x.scalar_type();
  const int64_t g = A.size(0), r = A.size(1), m = B.size(1);
  const Tensor gy = rows_of(grad_y), rows = rows_of(x);
  const Tensor through = at::empty({gy.size(0), g * r}, x.options());  // s G_i B_i, per target
  for (int64_t i = 0; i < g; ++i) {
    Tensor slice = through.narrow(1, i * r, r);
    at::mm_out(slice, gy.narrow(1, offsets[i], m), B[i].to(type));
  }
  if (scale != 1) through.mul_(scale);
  Tensor grad_x = at::empty({0}, x.options());
  if (need_x) grad_x = at::mm(gy, weight).addmm_(through, stacked(effective, type)).view(x.sizes());
  const Tensor grad_A = at::mm(through.t(), rows).to(A.scalar_type()).view(A.sizes());

  FullFloat32 guard;
  Tensor inner = rows_of(xA);
  if (rectify == "tangent" && !is_empty(basis)) {
    inner = at::mm(rows, stacked(project(A, basis), type).t());  // G P A^T needs only x (A P)^T, not G V
  }
  const Tensor grad_B = at::empty(B.sizes(), B.options());
  for (int64_t i = 0; i < g; ++i) {
    grad_B[i].copy_(at::mm(gy.narrow(1, offsets[i], m).t(), inner.narrow(1, i * r, r)));
  }
  if (scale != 1) grad_B.mul_(scale);
  const auto [dA, dB] = rectified(effective, B, grad_A, grad_B, basis, {scale, rectify, damping, share, balance});
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
