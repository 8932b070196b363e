// Left singular vectors and squared singular values of a tall matrix: what an incremental SVD keeps and a basis grows
// by.
//
//   M = Q R,  R R^T = Z diag(values) Z^T in float64,  M = (Q Z) diag(sqrt(values)) (right singular vectors)^T
//
// Q Z is orthonormal to the dtype's rounding whatever M's rank, which an eigendecomposition of M^T M would not give,
// and a symmetric eigendecomposition of R R^T is several times faster than an SVD of R. Squaring R costs nothing that
// counts: float64 resolves singular values down to 1e-8 of the largest.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/geqrf.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ormqr.h>
#include <ATen/ops/triu.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "checks.h"

namespace janus {

struct LeftFactor {
  Tensor householder, tau;  // Q, as LAPACK keeps it
  Tensor Z;                 // [p, p], columns by descending value; p = min(n, columns of M)
  Tensor values;            // [p], float64, descending, not negative, in units of unit^2
  Tensor unit;              // the largest entry of R: no square overflows

  // The first `count` left singular vectors, [n, count], column-major.
  Tensor vectors(int64_t count) const {
    Tensor padded = at::zeros({count, householder.size(0)}, householder.options()).mT();
    padded.slice(0, 0, Z.size(0)).copy_(Z.slice(1, 0, count));
    return at::ormqr_out(padded, householder, tau, padded);
  }
};

// M [n, c], column-major, is overwritten: Q takes its place. `message` says what was not finite.
inline LeftFactor left_factor(Tensor M, const char* message) {
  const int64_t p = std::min(M.size(0), M.size(1));
  Tensor tau = at::empty({p}, M.options());
  at::geqrf_out(M, tau, M);
  const Tensor R = at::triu(M.slice(0, 0, p)).to(at::kDouble);
  const Tensor unit = R.abs().amax();
  TORCH_CHECK_VALUE(at::isfinite(unit).item<bool>(), message);  // whatever is not finite in M has spread to R
  const Tensor scaled = R / unit.clamp_min(std::numeric_limits<double>::min());
  const auto [ascending, Z] = at::linalg_eigh(at::matmul(scaled, scaled.mT()));
  return {M, tau, Z.flip(1), ascending.flip(0).clamp_min(0), unit};
}

}  // namespace janus
