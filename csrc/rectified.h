// Gradient Rectification of one layer's factor gradients, device-independent: products and r x r algebra through ATen.
//
//   dA = (1/s) B^+ G_safe + Z A,   dB = (1/s) (I - P_B) G_safe A^+ - B Z,   Z = -(share/s) B^+ G_safe A^+
//
// with damped pseudo-inverses, from g_A = s B^T G and g_B = s G P A^T (the plain gradient of B when A V = 0).
#pragma once

#include <ATen/ops/cholesky_inverse.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_cholesky_ex.h>

#include <utility>

#include "basis.h"
#include "checks.h"

namespace janus {

inline constexpr double kDampingFloor = 1e-12;   // reference.DAMPING_FLOOR
inline constexpr double kBasisTolerance = 1e-3;  // reference.BASIS_TOLERANCE

struct Rectification {
  double scale;
  std::string_view mode;
  double damping;
  double share;
  bool balance;
};

// tr(S) / r for S [..., r, r], kept as [..., 1, 1].
inline Tensor mean_eigenvalue(const Tensor& S) {
  return S.diagonal(0, -2, -1).mean(-1).unsqueeze(-1).unsqueeze(-1);
}

// (S + d I)^-1, d = max(damping, 4 r eps) * max(tr S / r, floor).
inline Tensor damped_inverse(const Tensor& S, const Tensor& mean, double damping) {
  const int64_t r = S.size(-1);
  const double eps =
      S.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
  const double relative = std::max(damping, 4.0 * static_cast<double>(r) * eps);
  const Tensor d = relative * mean.clamp_min(kDampingFloor);
  const auto [L, info] = at::linalg_cholesky_ex(S + d * at::eye(r, S.options()));
  return at::cholesky_inverse(L);
}

// The r x r matrices [..., r, r] of the closest update from g_A P and g_B, but for the factor 1/s^2 when not balanced:
//
//   dA = safe_A (g_A P) + A A,   dB = g_B grad_B + B B
struct Combination {
  Tensor safe_A, A, grad_B, B;
};

// From A A^T, B^T B and B^T g_B.
inline Combination closest_combination(const Tensor& gram_A, const Tensor& gram_B, const Tensor& cross,
                                       const Rectification& options) {
  const Tensor mean_A = mean_eigenvalue(gram_A), mean_B = mean_eigenvalue(gram_B);
  const Tensor inverse_A = damped_inverse(gram_A, mean_A, options.damping);
  const Tensor inverse_B = damped_inverse(gram_B, mean_B, options.damping);
  const Tensor common = at::matmul(at::matmul(inverse_B, cross), inverse_A);  // s B^+ G_safe A^+
  const Combination plain{inverse_B, -options.share * common, inverse_A, (options.share - 1) * common};
  if (!options.balance) return plain;
  return {plain.safe_A * mean_B, plain.A * mean_B, plain.grad_B * mean_A, plain.B * mean_A};
}

// From s B^T G P and s G P A^T, A [..., r, n], B [..., m, r]; see the formula above and reference.rectified.
inline std::pair<Tensor, Tensor> closest_update(const Tensor& A, const Tensor& B, const Tensor& safe_A,
                                                const Tensor& grad_B, const Rectification& options) {
  const Combination by =
      closest_combination(at::matmul(A, A.mT()), at::matmul(B.mT(), B), at::matmul(B.mT(), grad_B), options);
  const Tensor dA = at::matmul(by.safe_A, safe_A) + at::matmul(by.A, A);
  const Tensor dB = at::matmul(grad_B, by.grad_B) + at::matmul(B, by.B);
  if (options.balance) return {dA, dB};
  return {dA / options.scale / options.scale, dB / options.scale / options.scale};  // s^2 may be no float
}

inline std::pair<Tensor, Tensor> rectified(const Tensor& A, const Tensor& B, const Tensor& grad_A, const Tensor& grad_B,
                                           const OptionalTensor& basis, const Rectification& options) {
  if (options.mode == "none") return {grad_A, grad_B};
  const Tensor safe_A = project(grad_A, basis);
  if (options.mode == "project") return {safe_A, grad_B};
  return closest_update(A, B, safe_A, grad_B, options);
}

}  // namespace janus
