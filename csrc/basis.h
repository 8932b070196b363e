// Growing the protected basis, in float64 through ATen: the same code serves CPU and CUDA (eigh and qr are torch's
// own).
//
//   R = P C^p P,  eigenvalues l_1 >= l_2 >= ...;  smallest q with  tr(V^T C^p V) + l_1 + ... + l_q >= energy * tr(C^p)
//   V <- orth([V, u_1 .. u_q]);  eigenvalues below n eps(dtype of C) (largest eigenvalue of C^p) are rounding
#pragma once

#include <ATen/ops/cat.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/linalg_eigvalsh.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>

#include <limits>

#include "checks.h"

namespace janus {

// M P = M - (M V) V^T for M [..., n].
inline Tensor project(const Tensor& M, const OptionalTensor& basis) {
  return is_empty(basis) ? M : M - at::matmul(at::matmul(M, *basis), basis->mT());
}

// The rule above for the candidates `values`, descending: at most `room`, and all of them if none reaches the energy.
inline int64_t directions_needed(const Tensor& values, const Tensor& have, const Tensor& total, double energy,
                                 int64_t room) {
  if ((have >= energy * total).item<bool>()) return 0;
  const auto wanted = (have + values.cumsum(0) < energy * total).sum().item<int64_t>() + 1;
  return std::min(std::min(wanted, values.numel()), room);
}

// How many of `values`, descending, stand above the rounding of a Gram matrix whose largest eigenvalue is `largest`.
inline int64_t count_candidates(const Tensor& values, double largest, at::ScalarType gram_type) {
  const double eps =
      gram_type == at::kDouble ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
  return (values > static_cast<double>(values.numel()) * eps * largest).sum().item<int64_t>();
}

// Q of the QR factorisation of M [n, k'] with the signs of M's columns; the first `kept` columns barely move.
inline Tensor orthonormalise(const Tensor& M, int64_t kept) {
  if (M.size(1) == kept) return M;
  const auto [Q, R] = at::linalg_qr(M);
  const Tensor diagonal = R.diagonal();
  const Tensor ones = at::ones_like(diagonal);
  return Q * at::where(diagonal < 0, -ones, ones);
}

inline Tensor extend_basis(const Tensor& basis, const Tensor& gram, double energy, int64_t max_rank,
                           int64_t energy_power) {
  check_extend_basis(basis, gram, energy, max_rank, energy_power);
  Tensor C = gram.to(at::kDouble);
  TORCH_CHECK_VALUE(at::isfinite(C).all().item<bool>(),
                    "extend_basis: gram must be finite, got NaN or infinite entries");
  const double trace = C.trace().item<double>();
  TORCH_CHECK_VALUE(trace > 0, "extend_basis: gram must have a positive trace, got ", trace);

  C = C / trace;  // energy shares do not change; C^2 cannot overflow
  if (energy_power == 2) C = at::matmul(C, C);
  const Tensor V = basis.to(at::kDouble);
  const Tensor rest = project(project(C, V).mT(), V);
  const auto [ascending, vectors] = at::linalg_eigh((rest + rest.mT()) / 2);
  const Tensor values = ascending.flip(0), inside = at::matmul(V.mT(), at::matmul(C, V));
  const int64_t n = V.size(0), k = V.size(1);
  const double inner = k > 0 ? at::linalg_eigvalsh(inside)[k - 1].item<double>() : 0;
  const auto candidates = count_candidates(values, std::max(values[0].item<double>(), inner), gram.scalar_type());
  const auto added = directions_needed(values.slice(0, 0, candidates), inside.trace(), C.trace(), energy, max_rank - k);
  const Tensor leading = vectors.slice(1, n - added, n).flip(1);
  return orthonormalise(at::cat({V, leading}, 1), k).to(basis.scalar_type()).contiguous();
}

}  // namespace janus
