// Growing the protected basis, in float64 through ATen: the same code serves CPU and CUDA (eigh and qr are torch's
// own).
//
//   R = P C^p P,  eigenvalues l_1 >= l_2 >= ...;  smallest q with  tr(V^T C^p V) + l_1 + ... + l_q >= energy * tr(C^p)
//   V <- orth([V, u_1 .. u_q])
#pragma once

#include <ATen/ops/cat.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/linalg_eigh.h>
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

// The rule above: at most `room` and the numerical rank. `values` [n] descending, all on the device of the Gram matrix.
inline int64_t directions_needed(const Tensor& values, const Tensor& have, const Tensor& total, double energy,
                                 int64_t room) {
  if (room == 0 || (have >= energy * total).item<bool>()) return 0;
  const double resolution = static_cast<double>(values.numel()) * std::numeric_limits<double>::epsilon();
  const auto candidates = (values > resolution * values[0]).sum().item<int64_t>();
  const Tensor captured = have + values.slice(0, 0, candidates).cumsum(0);
  const auto wanted = (captured < energy * total).sum().item<int64_t>() + 1;
  return std::min(std::min(wanted, candidates), room);
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
  const Tensor have = (at::matmul(C, V) * V).sum();
  const int64_t n = V.size(0), k = V.size(1);
  const int64_t added = directions_needed(ascending.flip(0), have, C.trace(), energy, max_rank - k);
  const Tensor leading = vectors.slice(1, n - added, n).flip(1);
  return orthonormalise(at::cat({V, leading}, 1), k).to(basis.scalar_type()).contiguous();
}

}  // namespace janus
