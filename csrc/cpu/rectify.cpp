// rectify_ on the CPU: layers on one basis are multiplied with it together, targets of one rank are solved together.
// Such parts run side by side. When all layers are computed and have passed their check, the gradients are written.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <map>
#include <numeric>
#include <tuple>

#include "../precision.h"
#include "../rectified.h"

namespace janus {
namespace {

// Of one part: fewer cost more calls, more leave threads idle. Not by the number of threads, which would change the
// bits.
constexpr int64_t kRows = 64;   // of a product with a basis
constexpr size_t kTargets = 8;  // of a solution

using Indices = std::vector<int64_t>;

template <typename Function>
void for_each_index(size_t count, const Function& function) {
  at::parallel_for(0, static_cast<int64_t>(count), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;  // worker threads start with gradients on
    for (int64_t i = begin; i < end; ++i) function(i);
  });
}

int64_t rows_of(const Tensor& A) {
  return A.numel() / A.size(-1);
}

// Layers with one basis, which is one place in memory seen alike, some kRows rows of A and g_A at a time.
std::vector<Indices> by_basis(at::TensorList A, at::TensorList basis) {
  using Place = std::tuple<const void*, at::ScalarType, std::vector<int64_t>, std::vector<int64_t>>;
  std::map<Place, std::pair<size_t, int64_t>> open;  // the part that takes the next layer, and its rows
  std::vector<Indices> parts;
  for (size_t i = 0; i < basis.size(); ++i) {
    const Tensor& V = basis[i];
    if (is_empty(V)) continue;
    auto& [part, rows] =
        open.try_emplace({V.const_data_ptr(), V.scalar_type(), V.sizes().vec(), V.strides().vec()}, parts.size(), kRows)
            .first->second;
    if (rows >= kRows) {
      part = parts.size();
      rows = 0;
      parts.emplace_back();
    }
    parts[part].push_back(static_cast<int64_t>(i));
    rows += 2 * rows_of(A[i]);
  }
  return parts;
}

double frobenius_norm(const Tensor& M) {
  return at::linalg_vector_norm(M).item<double>();
}

struct Norms {
  double inside = 0, whole = 0;  // |A V|, |A|
};

// |A V| <= tolerance |A| in all layers.
void check_safe_factors(const std::vector<Norms>& norms) {
  for (size_t i = 0; i < norms.size(); ++i)
    TORCH_CHECK_VALUE(!(norms[i].inside > kBasisTolerance * norms[i].whole), "rectify_: layer ", i,
                      ": rectify='exact' presumes A V = 0, got |A V| = ", norms[i].inside,
                      " with |A| = ", norms[i].whole);
}

// g_A P of all layers. "exact" presumes A V = 0: the product with V that projects serves the check, too.
std::vector<Tensor> projected(at::TensorList A, at::TensorList grad_A, at::TensorList basis, bool is_exact) {
  std::vector<Tensor> safe = grad_A.vec();
  std::vector<Norms> norms(A.size());
  const std::vector<Indices> parts = by_basis(A, basis);
  for_each_index(parts.size(), [&](int64_t part) {
    const Indices& layers = parts[part];
    const Tensor& V = basis[layers.front()];
    std::vector<Tensor> matrices;
    std::vector<int64_t> counts;
    for (int64_t i : layers) {
      matrices.push_back(grad_A[i].flatten(0, -2));
      counts.push_back(rows_of(A[i]));
    }
    const int64_t count = std::accumulate(counts.begin(), counts.end(), int64_t{0});
    if (is_exact)
      for (int64_t i : layers) matrices.push_back(A[i].flatten(0, -2));
    const Tensor rows = at::cat(matrices), products = at::mm(rows, V);
    const auto gradients =
        at::addmm(rows.narrow(0, 0, count), products.narrow(0, 0, count), V.t(), 1, -1).split_with_sizes(counts);
    int64_t first = count;
    for (size_t j = 0; j < layers.size(); first += counts[j++]) {
      safe[layers[j]] = gradients[j].view(grad_A[layers[j]].sizes());
      if (is_exact)
        norms[layers[j]] = {frobenius_norm(products.narrow(0, first, counts[j])), frobenius_norm(A[layers[j]])};
    }
  });
  check_safe_factors(norms);
  return safe;
}

// One pair of factors, [r, n] and [m, r], with what its update is computed from and written to.
struct Target {
  Tensor A, B, safe_A, grad_B, dA, dB;
  double scale;
};

// The closest updates of targets of one rank and dtype.
void solve(std::vector<Target>& targets, const Rectification& options) {
  const auto count = static_cast<int64_t>(targets.size()), r = targets.front().A.size(0);
  const Tensor grams_A = at::empty({count, r, r}, targets.front().A.options());
  const Tensor grams_B = at::empty({count, r, 2 * r}, grams_A.options());
  std::vector<Tensor> of_A = grams_A.unbind(), of_B = grams_B.unbind(), both(count);
  for (int64_t t = 0; t < count; ++t) {
    const Target& of = targets[t];
    both[t] = at::cat({of.B, of.grad_B}, 1);  // short rows are slow to multiply: as few products as can be
    at::mm_out(of_A[t], of.A, of.A.t());
    at::mm_out(of_B[t], of.B.t(), both[t]);
  }
  const Combination by = closest_combination(grams_A, grams_B.narrow(-1, 0, r), grams_B.narrow(-1, r, r), options);
  const auto by_A = by.A.unbind(), by_safe_A = by.safe_A.unbind(), by_both = at::cat({by.B, by.grad_B}, 1).unbind();
  for (int64_t t = 0; t < count; ++t) {
    Target& of = targets[t];
    at::mm_out(of.dA, by_safe_A[t], of.safe_A);
    of.dA.addmm_(by_A[t], of.A);
    at::mm_out(of.dB, both[t], by_both[t]);
    if (options.balance || of.scale == 1) continue;
    of.dA.div_(of.scale).div_(of.scale);  // s^2 may be no float
    of.dB.div_(of.scale).div_(of.scale);
  }
}

// Pairs of new memory for dA and dB of all layers, and their targets in parts that `solve` takes.
struct Updates {
  std::vector<Tensor> dA, dB;
  std::vector<std::vector<Target>> parts;

  Updates(at::TensorList A, at::TensorList B, const std::vector<Tensor>& safe_A, at::TensorList grad_B,
          at::ArrayRef<double> scale) {
    std::map<std::pair<at::ScalarType, int64_t>, size_t> open;  // the part that takes the next target of this kind
    for (size_t i = 0; i < A.size(); ++i) {
      dA.push_back(at::empty(A[i].sizes(), A[i].options()));
      dB.push_back(at::empty(B[i].sizes(), B[i].options()));
      const bool stacked = A[i].dim() == 3;
      for (int64_t t = 0; t < (stacked ? A[i].size(0) : 1); ++t) {
        const auto of = [&](const Tensor& M) { return stacked ? M.select(0, t) : M; };
        size_t& part = open.try_emplace({A[i].scalar_type(), A[i].size(-2)}, parts.size()).first->second;
        if (part == parts.size() || parts[part].size() == kTargets) {
          part = parts.size();
          parts.emplace_back();
        }
        parts[part].push_back(
            {of(A[i]), of(B[i]), of(safe_A[i]), of(grad_B[i]), of(dA.back()), of(dB.back()), scale[i]});
      }
    }
  }
};

void rectify_(at::TensorList A, at::TensorList B, at::TensorList grad_A, at::TensorList grad_B, at::TensorList basis,
              at::ArrayRef<double> scale, std::string_view rectify, double damping, double share, bool balance) {
  check_rectify_batch(A, B, grad_A, grad_B, basis, scale, rectify, damping, share);
  if (rectify == "none") return;
  const FullFloat32 precision;
  const std::vector<Tensor> safe_A = projected(A, grad_A, basis, rectify == "exact");
  if (rectify == "project") {
    for (size_t i = 0; i < A.size(); ++i) grad_A[i].copy_(safe_A[i]);
    return;
  }
  Updates updates(A, B, safe_A, grad_B, scale);
  for_each_index(updates.parts.size(),
                 [&](int64_t part) { solve(updates.parts[part], {1, rectify, damping, share, balance}); });
  for (size_t i = 0; i < A.size(); ++i) {
    grad_A[i].copy_(updates.dA[i]);
    grad_B[i].copy_(updates.dB[i]);
  }
}

}  // namespace
}  // namespace janus

TORCH_LIBRARY_IMPL(janus_ext, CPU, m) {
  m.impl("rectify_", TORCH_FN(janus::rectify_));
}
