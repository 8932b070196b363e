// Growing the protected basis through ATen: the same code serves CPU and CUDA (eigh and qr are torch's own). In
// float64, but for the factor of an incremental SVD, which stays in its dtype until its directions are known.
//
//   R = P C^p P,  eigenvalues l_1 >= l_2 >= ...;  smallest q with  tr(V^T C^p V) + l_1 + ... + l_q >= energy * tr(C^p)
//   V <- [V, orth(P [u_1 .. u_q])];  eigenvalues that are rounding of C, or of its factor, are no candidates
//
// R is 0 on V, so a Gram matrix is taken apart in the complement of V: with V = Q R as k reflectors, which are applied
// and not written out, C becomes Q^T C Q, whose last n - k rows hold all that is needed, and u = Q [0; z].
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/geqrf.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/linalg_eigvalsh.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/ormqr.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <limits>
#include <tuple>

#include "checks.h"
#include "factor.h"
#include "precision.h"

namespace janus {

// M P = M - (M V) V^T for M [..., n].
inline Tensor project(const Tensor& M, const OptionalTensor& basis) {
  return is_empty(basis) ? M : at::matmul(at::matmul(M, *basis), basis->mT()).neg_().add_(M);
}

// The rule above for the candidates `values`, descending: at most `room`, and all of them if none reaches the energy.
// On the CPU, where the running sum is the same in every run; the answer is wanted there anyway.
inline int64_t directions_needed(const Tensor& values, const Tensor& have, const Tensor& total, double energy,
                                 int64_t room) {
  const Tensor held = have.cpu(), asked = energy * total.cpu();
  if ((held >= asked).item<bool>()) return 0;
  const auto wanted = (held + values.cpu().cumsum(0) < asked).sum().item<int64_t>() + 1;
  return std::min(std::min(wanted, values.numel()), room);
}

inline double epsilon(at::ScalarType type) {
  return type == at::kDouble ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
}

inline int64_t count_above(const Tensor& values, double threshold) {
  return (values > threshold).sum().item<int64_t>();
}

// V in float64, its columns made orthonormal: P must be a projector to more than V's own rounding.
inline Tensor orthonormal(const Tensor& V) {
  return V.size(1) == 0 ? V.to(at::kDouble) : std::get<0>(at::linalg_qr(V.to(at::kDouble)));
}

// The orthogonal Q [n, n] whose first k columns span V, as LAPACK keeps it: k reflectors.
struct Frame {
  Tensor householder, tau;

  explicit Frame(const Tensor& V) { std::tie(householder, tau) = at::geqrf(V); }
  bool is_identity() const { return tau.numel() == 0; }

  // Q^T C Q
  Tensor seen(const Tensor& C) const {
    if (is_identity()) return C;
    const Tensor rows = at::ormqr(householder, tau, C, /*left=*/true, /*transpose=*/true);
    return at::ormqr(householder, tau, rows, /*left=*/false, /*transpose=*/false);
  }

  // Q [0; z] for z [n - k, q]
  Tensor outside(const Tensor& z) const {
    if (is_identity()) return z;
    const Tensor padded = at::cat({at::zeros({tau.size(0), z.size(1)}, z.options()), z});
    return at::ormqr(householder, tau, padded, /*left=*/true, /*transpose=*/false);
  }
};

// [V, orth(P u)] for u [n, q] that lies outside V but for rounding, P the projector off the orthonormal `span` of V. V
// itself does not move, nor do the signs of u.
inline Tensor grown(const Tensor& V, const Tensor& span, const Tensor& u) {
  if (u.size(1) == 0) return V.clone(at::MemoryFormat::Contiguous);
  const auto [Q, R] = at::linalg_qr(project(u.mT(), span).mT());
  const Tensor diagonal = R.diagonal(), ones = at::ones_like(diagonal);
  const Tensor same_signs = Q.mul_(at::where(diagonal < 0, -ones, ones));
  return at::cat({V, same_signs.to(V.scalar_type())}, 1).contiguous();
}

inline void check_finite(const std::string& op, const Tensor& basis) {
  TORCH_CHECK_VALUE(at::isfinite(basis).all().item<bool>(), op, ": basis must be finite, got NaN or infinite entries");
}

inline Tensor extend_basis(const Tensor& basis, const Tensor& gram, double energy, int64_t max_rank,
                           int64_t energy_power) {
  check_extend_basis(basis, gram, energy, max_rank, energy_power);
  Tensor C = gram.to(at::kDouble);
  TORCH_CHECK_VALUE(at::isfinite(C).all().item<bool>(),
                    "extend_basis: gram must be finite, got NaN or infinite entries");
  check_finite("extend_basis", basis);
  const double trace = C.trace().item<double>();
  TORCH_CHECK_VALUE(trace > 0, "extend_basis: gram must have a positive trace, got ", trace);

  C = (C + C.mT()) / (2 * trace);  // energy shares do not change; C^2 cannot overflow
  const int64_t n = basis.size(0), k = basis.size(1);
  const Frame frame(basis.to(at::kDouble));
  const Tensor D = frame.seen(C);
  const auto block = [&](int64_t begin, int64_t end) {  // of Q^T C^p Q
    const Tensor rows = D.slice(0, begin, end);
    return energy_power == 2 ? at::matmul(rows, rows.mT()) : rows.slice(1, begin, end);
  };
  const Tensor total = energy_power == 2 ? C.square().sum() : C.trace(), inside = block(0, k);
  const auto [ascending, vectors] = at::linalg_eigh(block(k, n));
  const Tensor values = ascending.flip(0);
  const double inner = k > 0 ? at::linalg_eigvalsh(inside)[k - 1].item<double>() : 0;
  const double largest = std::max(k < n ? values[0].item<double>() : 0, inner);
  const double rounding = static_cast<double>(n) * epsilon(gram.scalar_type());  // of C, per its largest eigenvalue
  const auto needed = [&](const Tensor& candidates) {
    return directions_needed(candidates, inside.trace(), total, energy, max_rank - k);
  };
  if (energy_power == 2) {
    const Tensor u = vectors.flip(1), energies = (at::matmul(D.slice(0, k, n).slice(1, k, n), u) * u).sum(0);
    const double squaring = static_cast<double>(n) * epsilon(at::kDouble);
    const Tensor is_known = energies.gt(rounding * std::sqrt(largest)).logical_and(values.gt(squaring * largest));
    const Tensor known = is_known.nonzero().flatten();
    const Tensor leading = u.index_select(1, known.slice(0, 0, needed(values.index_select(0, known))));
    return grown(basis, orthonormal(basis), frame.outside(leading));
  }
  const auto added = needed(values.slice(0, 0, count_above(values, rounding * largest)));
  const Tensor leading = vectors.slice(1, n - k - added, n - k).flip(1);
  return grown(basis, orthonormal(basis), frame.outside(leading));
}

// The same from C = U diag(S^2) U^T, which is not formed, and the trace that C had before it was truncated.
inline Tensor extend_basis_factor(const Tensor& basis, const Tensor& U, const Tensor& S, const Tensor& total,
                                  double energy, int64_t max_rank) {
  check_extend_basis_factor(basis, U, S, total, energy, max_rank);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;  // out= refuses what requires a gradient
  const double trace = total.item<double>(), largest = S.amax().item<double>();
  const auto* message = "extend_basis_factor: U, S and total must be finite, got NaN or infinite entries";
  TORCH_CHECK_VALUE(std::isfinite(trace) && std::isfinite(largest), message);
  TORCH_CHECK_VALUE(trace > 0 && largest > 0, "extend_basis_factor: total and the largest of S must be positive, got ",
                    trace, " and ", largest);
  check_finite("extend_basis_factor", basis);
  const int64_t n = basis.size(0), k = basis.size(1);
  const FullFloat32 precision;  // the factor is projected in its own dtype, new directions once more in float64
  const Tensor V = orthonormal(basis), V_U = V.to(U.scalar_type());
  const Tensor whole = total / (largest * largest);
  // Rounding of the factor, and of squaring it in float64; its largest singular value is 1.
  const double noise = static_cast<double>(n) *
                       std::max(static_cast<double>(n) * std::pow(epsilon(U.scalar_type()), 2), epsilon(at::kDouble));
  const Tensor directions = [&] {  // what it works on is free again when it returns
    const Tensor rows = at::mul(U.mT(), (S / largest).unsqueeze(1)).contiguous();  // C = rows^T rows, but for largest^2
    const Tensor inside = at::matmul(rows, V_U).to(at::kDouble).square().sum();
    const LeftFactor rest = left_factor(project(rows, V_U).mT(), message);
    const Tensor values = rest.values * rest.unit.square();
    const auto candidates = count_above(values, noise);
    return rest.vectors(directions_needed(values.slice(0, 0, candidates), inside, whole, energy, max_rank - k));
  }();
  return grown(basis, V, directions.to(at::kDouble));
}

}  // namespace janus
