// Incremental SVD, device-independent: U [n, l], S [l] of all rows seen, by blocks of rows X.
//
//   [diag(S) U^T ; X] = (left singular vectors) diag(S') U'^T, of which the l leading values and vectors are kept;
//   shrink: S'^2 <- S'^2 - S'_l^2 (Frequent Directions, Liberty 2013)
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include <tuple>

#include "factor.h"
#include "precision.h"

namespace janus {

using Sketch = std::tuple<Tensor, Tensor>;  // U, S

// The rows [N, n], at least one, by blocks. What it works on is free again when it returns.
inline Sketch absorb_rows(Tensor U, Tensor S, const Tensor& rows, int64_t block_rows, bool shrink) {
  const int64_t n = U.size(0), l = U.size(1);
  const Tensor stacked =
      at::empty({l + std::min(block_rows, rows.size(0)), n}, U.options());  // its transpose is factored
  for (int64_t begin = 0; begin < rows.size(0); begin += block_rows) {
    const Tensor block = rows.slice(0, begin, begin + block_rows), used = stacked.slice(0, 0, l + block.size(0));
    used.slice(0, 0, l).copy_(U.mT()).mul_(S.unsqueeze(1));
    U.reset();  // its memory serves the new vectors
    used.slice(0, l).copy_(block);
    const LeftFactor factor =
        left_factor(used.mT(), "isvd_update: x and the state must be finite, got NaN or infinite entries");
    Tensor squares = factor.values.slice(0, 0, l);
    if (shrink) squares = squares - squares[l - 1];
    U = factor.vectors(l);
    S = (squares.sqrt() * factor.unit).to(S.scalar_type());
  }
  return {U, S};
}

// `block_rows(n, l)`: how many rows a device takes at once.
template <auto block_rows>
Sketch isvd_update(const Tensor& basis, const Tensor& singular_values, const Tensor& x, double decay, bool shrink) {
  check_isvd_update(basis, singular_values, x, decay);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;  // out= refuses what requires a gradient
  const FullFloat32 precision;
  const Tensor rows = x.reshape({-1, basis.size(0)}), S = singular_values * std::sqrt(decay);
  if (rows.size(0) == 0) return {basis.clone(at::MemoryFormat::Contiguous), S};
  const auto [new_U, new_S] = absorb_rows(basis, S, rows, block_rows(basis.size(0), basis.size(1)), shrink);
  return {new_U.contiguous(), new_S};
}

}  // namespace janus
