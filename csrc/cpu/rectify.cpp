// rectify_ on the CPU, in steps that run through all layers: the products with the bases, one for all layers that share
// a basis; the check of all; the r x r algebra of all targets at once; the updates, written in place. Layers are
// independent, so each step's run side by side, each on one thread.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <tuple>

#include "../precision.h"
#include "../rectified.h"

namespace janus {
namespace {

using Indices = std::vector<int64_t>;

template <typename Function>
void for_each_index(size_t count, const Function& function) {
  at::parallel_for(0, static_cast<int64_t>(count), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;  // worker threads start with gradients on
    for (int64_t i = begin; i < end; ++i) function(i);
  });
}

// Layers with one basis, which is one place in memory seen alike.
std::vector<Indices> by_basis(at::TensorList basis) {
  std::map<std::tuple<const void*, at::ScalarType, std::vector<int64_t>, std::vector<int64_t>>, Indices> groups;
  for (size_t i = 0; i < basis.size(); ++i)
    groups[{basis[i].const_data_ptr(), basis[i].scalar_type(), basis[i].sizes().vec(), basis[i].strides().vec()}]
        .push_back(static_cast<int64_t>(i));
  std::vector<Indices> out;
  for (auto& [key, indices] : groups) out.push_back(std::move(indices));
  std::sort(out.begin(), out.end());  // by their first layers, whatever their place in memory
  return out;
}

// |A V| <= tolerance |A| for some layers, from the norms of the rows of their A V and A, on top of each other.
void check_safe_factors(const Indices& layers, const std::vector<int64_t>& counts, const Tensor& products,
                        const Tensor& factors) {
  const Tensor inside = at::linalg_vector_norm(products, 2, {1}).to(at::kDouble).square_();
  const Tensor whole = at::linalg_vector_norm(factors, 2, {1}).to(at::kDouble).square_();
  const auto norm = [](const Tensor& squares, int64_t first, int64_t count) {
    const double* const begin = squares.const_data_ptr<double>() + first;
    return std::sqrt(std::accumulate(begin, begin + count, 0.0));
  };
  int64_t first = 0;
  for (size_t j = 0; j < layers.size(); first += counts[j++]) {
    const double in = norm(inside, first, counts[j]), of = norm(whole, first, counts[j]);
    TORCH_CHECK_VALUE(!(in > kBasisTolerance * of), "rectify_: layer ", layers[j],
                      ": rectify='exact' presumes A V = 0, got |A V| = ", in, " with |A| = ", of);
  }
}

// g_A P of all layers, in memory of its own. "exact" presumes A V = 0: the product with V that projects serves the
// check, too.
std::vector<Tensor> projected(at::TensorList A, at::TensorList grad_A, at::TensorList basis, bool is_exact) {
  std::vector<Tensor> safe(grad_A.size());
  const std::vector<Indices> groups = by_basis(basis);
  for_each_index(groups.size(), [&](int64_t group) {
    const Indices& layers = groups[group];
    const Tensor& V = basis[layers.front()];
    std::vector<Tensor> rows;
    std::vector<int64_t> counts;
    for (int64_t i : layers) {
      rows.push_back(grad_A[i].flatten(0, -2));
      counts.push_back(rows.back().size(0));
    }
    const int64_t count = std::accumulate(counts.begin(), counts.end(), int64_t{0});
    if (is_exact)
      for (int64_t i : layers) rows.push_back(A[i].flatten(0, -2));
    const Tensor all = at::cat(rows), products = at::mm(all, V);
    if (is_exact) check_safe_factors(layers, counts, products.narrow(0, count, count), all.narrow(0, count, count));
    const auto parts =
        at::addmm(all.narrow(0, 0, count), products.narrow(0, 0, count), V.t(), 1, -1).split_with_sizes(counts);
    for (size_t j = 0; j < layers.size(); ++j) safe[layers[j]] = parts[j].view(grad_A[layers[j]].sizes());
  });
  return safe;
}

// One pair of factors, [r, n] and [m, r], with its gradients and g_A P.
struct Target {
  Tensor A, B, grad_A, grad_B, safe_A;
  double gain;
};

// Writes the closest updates of targets of one rank and dtype.
void update(const std::vector<Target>& targets, const Rectification& options) {
  const auto count = static_cast<int64_t>(targets.size()), r = targets.front().A.size(0);
  const Tensor grams_A = at::empty({count, r, r}, targets.front().A.options());
  const Tensor grams_B = at::empty({count, r, 2 * r}, grams_A.options());
  std::vector<Tensor> of_A = grams_A.unbind(), of_B = grams_B.unbind(), both(count);
  for_each_index(count, [&](int64_t t) {
    const Target& of = targets[t];
    both[t] = at::cat({of.B, of.grad_B}, 1);  // short rows are slow to multiply: as few products as can be
    at::mm_out(of_A[t], of.A, of.A.t());
    at::mm_out(of_B[t], of.B.t(), both[t]);
  });
  const Combination by = closest_combination(grams_A, grams_B.narrow(-1, 0, r), grams_B.narrow(-1, r, r), options);
  const auto by_A = by.A.unbind(), by_safe_A = by.safe_A.unbind(), by_both = at::cat({by.B, by.grad_B}, 1).unbind();
  for_each_index(count, [&](int64_t t) {
    Target of = targets[t];
    at::addmm_out(of.grad_A, of.grad_A, by_safe_A[t], of.safe_A, 0, of.gain);
    of.grad_A.addmm_(by_A[t], of.A, 1, of.gain);
    at::addmm_out(of.grad_B, of.grad_B, both[t], by_both[t], 0, of.gain);
  });
}

void rectify_(at::TensorList A, at::TensorList B, at::TensorList grad_A, at::TensorList grad_B, at::TensorList basis,
              at::ArrayRef<double> scale, std::string_view rectify, double damping, double share, bool balance) {
  check_rectify_batch(A, B, grad_A, grad_B, basis, scale, rectify, damping, share);
  if (rectify == "none") return;
  const FullFloat32 precision;
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const std::vector<Tensor> safe_A = projected(A, grad_A, basis, rectify == "exact");
  std::map<std::pair<at::ScalarType, int64_t>, std::vector<Target>> alike;
  for (size_t i = 0; i < A.size(); ++i) {
    if (rectify == "project") {
      grad_A[i].copy_(safe_A[i]);
      continue;
    }
    const double gain_of = gain({scale[i], rectify, damping, share, balance});
    const auto target = [&](const Tensor& M, int64_t t) { return A[i].dim() == 3 ? M.select(0, t) : M; };
    for (int64_t t = 0; t < (A[i].dim() == 3 ? A[i].size(0) : 1); ++t)
      alike[{A[i].scalar_type(), A[i].size(-2)}].push_back({target(A[i], t), target(B[i], t), target(grad_A[i], t),
                                                            target(grad_B[i], t), target(safe_A[i], t), gain_of});
  }
  for (auto& [kind, targets] : alike) update(targets, {1, rectify, damping, share, balance});
}

}  // namespace
}  // namespace janus

TORCH_LIBRARY_IMPL(janus_ext, CPU, m) {
  m.impl("rectify_", TORCH_FN(janus::rectify_));
}
