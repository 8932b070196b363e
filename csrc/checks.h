// Argument checks shared by CPU and CUDA. The texts equal those of janus_ext/reference: a test compares them.
// Wrong shapes and values raise ValueError, wrong dtypes TypeError; nothing has been written when a check fails.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace janus {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline constexpr auto kWorking = {at::kFloat, at::kDouble};
inline constexpr int64_t kTooMany = int64_t{1} << 40;  // of an expanded tensor; products of such sizes would overflow
inline constexpr auto kInputs = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};

inline std::string dtype_name(at::ScalarType type) {
  return std::string(c10::getDtypeNames(type).first);
}

// As Python's ascii() has bytes: on one line, whatever they are.
inline std::string quoted(std::string_view text) {
  constexpr const char* kDigits = "0123456789abcdef";
  std::string out = "'";
  for (const char c : text) {
    const auto code = static_cast<unsigned char>(c);
    if (c == '\n')
      out += "\\n";
    else if (code < 0x20 || code >= 0x7f)
      out += std::string("\\x") + kDigits[code / 16] + kDigits[code % 16];
    else
      out += c;
  }
  return out + "'";
}

inline std::string list_text(at::IntArrayRef values) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "") << values[i];
  text << ']';
  return text.str();
}

// What is written through a raw pointer: autograd is to notice where it had saved the tensor, as after any op in place.
inline void bump_version(const Tensor& written) {
  if (!written.is_inference()) written.unsafeGetTensorImpl()->bump_version();
}

inline bool is_empty(const OptionalTensor& basis) {
  return !basis || basis->size(-1) == 0;
}

inline void check_dtype(const std::string& op, const char* name, const Tensor& tensor,
                        std::initializer_list<at::ScalarType> allowed) {
  if (std::find(allowed.begin(), allowed.end(), tensor.scalar_type()) != allowed.end()) {
    TORCH_CHECK_VALUE(tensor.numel() < kTooMany, op, ": ", name, " must have fewer than 2^40 elements, got ",
                      list_text(tensor.sizes()));
    return;
  }
  std::string wanted;
  for (auto type : allowed) wanted += (wanted.empty() ? "" : ", ") + dtype_name(type);
  const std::string found = tensor.defined() ? dtype_name(tensor.scalar_type()) : "None";
  TORCH_CHECK_TYPE(false, op, ": ", name, " must be ", wanted, ", got ", found);
}

inline void check_shape(const std::string& op, const char* name, const Tensor& tensor, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, op, ": ", name, " must be ", list_text(shape), ", got ",
                    list_text(tensor.sizes()));
}

inline void check_device(const std::string& op, const char* name, const Tensor& tensor, const Tensor& like) {
  TORCH_CHECK_VALUE(tensor.device() == like.device(), op, ": ", name, " must be on ", like.device().str(), ", got ",
                    tensor.device().str());
}

inline void check_last(const std::string& op, const char* name, const Tensor& tensor, int64_t n) {
  TORCH_CHECK_VALUE(tensor.dim() >= 1 && tensor.size(-1) == n, op, ": ", name, " must be [..., n] with n = ", n,
                    ", got ", list_text(tensor.sizes()));
}

// What is rewritten in place must hold each element once; expanded tensors and sliding windows do not.
inline void check_writable(const std::string& op, const char* name, const Tensor& tensor) {
  TORCH_CHECK_VALUE(!(tensor.requires_grad() && at::GradMode::is_enabled()), op, ": ", name,
                    " is rewritten in place: it must not require a gradient, unless under torch.no_grad()");
  std::vector<std::pair<int64_t, int64_t>> steps;  // stride, size
  for (int64_t i = 0; i < tensor.dim(); ++i) steps.emplace_back(tensor.stride(i), tensor.size(i));
  std::sort(steps.begin(), steps.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : steps) {
    if (size <= 1) continue;
    TORCH_CHECK_VALUE(stride > reach, op, ": ", name, " must hold every element once, got strides ",
                      list_text(tensor.strides()), " that overlap");
    reach += stride * (size - 1);
  }
}

// A tensor without gaps in memory.
struct Span {
  const char* begin;
  const char* end;
  const char* name;
  int64_t index;  // in the list of this name
  bool is_written;
};

inline void add_spans(std::vector<Span>& spans, const char* name, at::TensorList tensors, bool is_written) {
  for (size_t index = 0; index < tensors.size(); ++index) {
    const Tensor& tensor = tensors[index];
    int64_t steps = 0;
    for (int64_t i = 0; i < tensor.dim(); ++i) steps += tensor.stride(i) * (tensor.size(i) - 1);
    if (tensor.numel() == 0 || tensor.numel() <= steps) continue;
    const auto* begin = static_cast<const char*>(tensor.const_data_ptr());
    spans.push_back(
        {begin, begin + (steps + 1) * tensor.element_size(), name, static_cast<int64_t>(index), is_written});
  }
}

// What is rewritten in place must share no memory with other arguments, as far as these have no gaps: columns of one
// matrix, say, may lie within each other without sharing an element.
inline void check_apart(const std::string& op, std::vector<Span> spans) {
  std::stable_sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  const Span *last = nullptr, *last_written = nullptr;  // that end last of those so far
  for (const Span& span : spans) {
    const Span* other = span.is_written ? last : last_written;
    TORCH_CHECK_VALUE(!other || span.begin >= other->end, op, ": ", span.name, "[", span.index, "] and ", other->name,
                      "[", other->index, "] must not share memory, got some of both at one place");
    if (!last || span.end > last->end) last = &span;
    if (span.is_written && (!last_written || span.end > last_written->end)) last_written = &span;
  }
}

inline void check_rectify(const std::string& op, double scale, std::string_view rectify, double damping, double share) {
  TORCH_CHECK_VALUE(rectify == "none" || rectify == "project" || rectify == "tangent" || rectify == "exact", op,
                    ": rectify must be one of none, project, tangent, exact, got ", quoted(rectify));
  using Float = std::numeric_limits<float>;  // what factors are kept in
  TORCH_CHECK_VALUE(std::abs(scale) >= Float::min() && std::abs(scale) <= Float::max(), op,
                    ": scale must be finite and not zero in float32, got ", scale);
  TORCH_CHECK_VALUE(damping > 0 && std::isfinite(damping), op, ": damping must be positive and finite, got ", damping);
  TORCH_CHECK_VALUE(0 <= share && share <= 1, op, ": share must be in [0, 1], got ", share);
}

// A [g, r, n], B [g, m, r], V [n, k]: float32 or float64, alike, on one device, k <= n.
inline void check_factors(const std::string& op, const Tensor& A, const Tensor& B, const OptionalTensor& basis) {
  check_dtype(op, "A", A, kWorking);
  check_dtype(op, "B", B, {A.scalar_type()});
  TORCH_CHECK_VALUE(A.dim() == 3, op, ": A must be [r, n] for each target, got ", A.dim() - 1, " dimensions");
  TORCH_CHECK_VALUE(B.dim() == 3, op, ": B must be [m, r] for each target, got ", B.dim() - 1, " dimensions");
  const int64_t n = A.size(2);
  TORCH_CHECK_VALUE(A.size(1) > 0 && n > 0, op, ": A must be [r, n] with r > 0 and n > 0, got ",
                    list_text(A.sizes().slice(1)));
  check_shape(op, "B", B, {A.size(0), B.size(1), A.size(1)});
  if (basis) {
    check_dtype(op, "basis", *basis, {A.scalar_type()});
    TORCH_CHECK_VALUE(basis->dim() == 2 && basis->size(0) == n && basis->size(1) <= n, op,
                      ": basis must be [n, k] with n = ", n, " and k <= n, got ", list_text(basis->sizes()));
  }
  check_device(op, "B", B, A);
  if (basis) check_device(op, "basis", *basis, A);
}

// x [..., n], weight [m, n], bias [m]: one dtype, on the device of A [..., n].
inline void check_linear(const std::string& op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                         const Tensor& A) {
  check_dtype(op, "x", x, kInputs);
  check_last(op, "x", x, A.size(-1));
  check_dtype(op, "weight", weight, {x.scalar_type()});
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == A.size(-1), op, ": weight must be [m, ", A.size(-1),
                    "], got ", list_text(weight.sizes()));
  if (bias) {
    check_dtype(op, "bias", *bias, {x.scalar_type()});
    check_shape(op, "bias", *bias, {weight.size(0)});
  }
  check_device(op, "x", x, A);
  check_device(op, "weight", weight, A);
  if (bias) check_device(op, "bias", *bias, A);
}

inline void check_gram_update(const Tensor& gram, const Tensor& x, double decay) {
  const std::string op = "gram_update_";
  check_dtype(op, "gram", gram, kWorking);
  TORCH_CHECK_VALUE(gram.dim() == 2 && gram.size(0) == gram.size(1) && gram.size(0) > 0, op,
                    ": gram must be [n, n] with n > 0, got ", list_text(gram.sizes()));
  check_writable(op, "gram", gram);
  check_dtype(op, "x", x, kInputs);
  check_last(op, "x", x, gram.size(0));
  check_device(op, "x", x, gram);
  TORCH_CHECK_VALUE(0 < decay && decay <= 1, op, ": decay must be in (0, 1], got ", decay);
}

inline void check_basis(const std::string& op, const Tensor& basis) {
  check_dtype(op, "basis", basis, kWorking);
  TORCH_CHECK_VALUE(basis.dim() == 2 && basis.size(1) <= basis.size(0) && basis.size(0) > 0, op,
                    ": basis must be [n, k] with k <= n and n > 0, got ", list_text(basis.sizes()));
}

inline void check_growth(const std::string& op, const Tensor& basis, double energy, int64_t max_rank) {
  const int64_t n = basis.size(0), k = basis.size(1);
  TORCH_CHECK_VALUE(0 <= energy && energy <= 1, op, ": energy must be in [0, 1], got ", energy);
  TORCH_CHECK_VALUE(k <= max_rank && max_rank <= n, op, ": max_rank must be from k = ", k, " to n = ", n, ", got ",
                    max_rank);
}

inline void check_extend_basis(const Tensor& basis, const Tensor& gram, double energy, int64_t max_rank,
                               int64_t energy_power) {
  const std::string op = "extend_basis";
  check_basis(op, basis);
  check_dtype(op, "gram", gram, kWorking);
  check_shape(op, "gram", gram, {basis.size(0), basis.size(0)});
  check_device(op, "gram", gram, basis);
  check_growth(op, basis, energy, max_rank);
  TORCH_CHECK_VALUE(energy_power == 1 || energy_power == 2, op, ": energy_power must be 1 or 2, got ", energy_power);
}

// U [n, l] and S [l] of an incremental SVD, alike: float32 or float64, on one device, 1 <= l <= n.
inline void check_factor(const std::string& op, const char* name_U, const Tensor& U, const char* name_S,
                         const Tensor& S) {
  check_dtype(op, name_U, U, kWorking);
  TORCH_CHECK_VALUE(U.dim() == 2 && U.size(1) > 0 && U.size(1) <= U.size(0), op, ": ", name_U,
                    " must be [n, l] with 0 < l <= n, got ", list_text(U.sizes()));
  check_dtype(op, name_S, S, {U.scalar_type()});
  check_shape(op, name_S, S, {U.size(1)});
  check_device(op, name_S, S, U);
}

inline void check_isvd_update(const Tensor& basis, const Tensor& singular_values, const Tensor& x, double decay) {
  const std::string op = "isvd_update";
  check_factor(op, "basis", basis, "singular_values", singular_values);
  check_dtype(op, "x", x, kInputs);
  check_last(op, "x", x, basis.size(0));
  check_device(op, "x", x, basis);
  TORCH_CHECK_VALUE(0 < decay && decay <= 1, op, ": decay must be in (0, 1], got ", decay);
}

inline void check_extend_basis_factor(const Tensor& basis, const Tensor& U, const Tensor& S, const Tensor& total,
                                      double energy, int64_t max_rank) {
  const std::string op = "extend_basis_factor";
  check_basis(op, basis);
  const int64_t n = basis.size(0);
  check_factor(op, "U", U, "S", S);
  TORCH_CHECK_VALUE(U.size(0) == n, op, ": U must be [n, l] with n = ", n, ", got ", list_text(U.sizes()));
  check_device(op, "U", U, basis);
  check_dtype(op, "total", total, {at::kDouble});
  check_shape(op, "total", total, {});
  check_growth(op, basis, energy, max_rank);
}

inline void check_lora_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& A,
                              const Tensor& B, const OptionalTensor& basis, double scale, std::string_view rectify,
                              double damping, double share) {
  const std::string op = "lora_linear";
  check_rectify(op, scale, rectify, damping, share);
  const auto one_target = [](const Tensor& factor) { return factor.defined() ? factor.unsqueeze(0) : factor; };
  check_factors(op, one_target(A), one_target(B), basis);
  check_linear(op, x, weight, bias, A);
  check_shape(op, "weight", weight, {B.size(0), A.size(1)});
}

inline void check_lora_qkv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& A,
                           const Tensor& B, const OptionalTensor& basis, double scale, std::string_view rectify,
                           double damping, double share, at::IntArrayRef targets) {
  const std::string op = "lora_qkv";
  check_rectify(op, scale, rectify, damping, share);
  check_factors(op, A, B, basis);
  check_linear(op, x, weight, bias, A);
  auto sorted = targets.vec();
  std::sort(sorted.begin(), sorted.end());
  const bool distinct = std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end();
  const bool in_range = sorted.empty() || (sorted.front() >= 0 && sorted.back() < 3);
  TORCH_CHECK_VALUE(static_cast<int64_t>(targets.size()) == A.size(0) && distinct && in_range, op,
                    ": targets must be distinct slices 0 (q), 1 (k), 2 (v), one for each of A's ", A.size(0), ", got ",
                    list_text(targets));
  check_shape(op, "weight", weight, {3 * B.size(1), A.size(2)});
}

// The rank in lora.h's big products: matrix units take rows of 16-bit numbers that begin at multiples of 16 bytes, and
// others at half the speed or less, so that zeros are added there.
inline int64_t padded_rank(int64_t r, at::ScalarType type) {
  return at::elementSize(type) == 2 ? (r + 7) / 8 * 8 : r;
}

// What the forward saved, and a gradient of its output: nobody else calls this op, but nothing it is given may crash
// it.
inline void check_lora_backward(const Tensor& grad_y, const Tensor& x, const Tensor& xA, const Tensor& effective,
                                const Tensor& weight, const Tensor& A, const Tensor& B, const OptionalTensor& basis,
                                double scale, std::string_view rectify, double damping, double share,
                                at::IntArrayRef offsets) {
  const std::string op = "lora_backward";
  check_rectify(op, scale, rectify, damping, share);
  check_factors(op, A, B, basis);
  check_linear(op, x, weight, std::nullopt, A);
  check_dtype(op, "effective", effective, {A.scalar_type()});
  check_shape(op, "effective", effective, A.sizes());
  check_device(op, "effective", effective, A);
  auto shape = x.sizes().vec();
  const auto check_rows = [&](const char* name, const Tensor& rows, int64_t width) {
    check_dtype(op, name, rows, {x.scalar_type()});
    shape.back() = width;
    check_shape(op, name, rows, shape);
    check_device(op, name, rows, A);
  };
  check_rows("grad_y", grad_y, weight.size(0));
  check_rows("xA", xA, A.size(0) * padded_rank(A.size(1), x.scalar_type()));
  const int64_t last = weight.size(0) - B.size(1);
  TORCH_CHECK_VALUE(static_cast<int64_t>(offsets.size()) == A.size(0) &&
                        std::all_of(offsets.begin(), offsets.end(), [&](int64_t o) { return 0 <= o && o <= last; }),
                    op, ": offsets must be ", A.size(0), " numbers from 0 to ", last, ", got ", list_text(offsets));
}

inline void check_margin_loss(const Tensor& features, const Tensor& prototypes, double margin, double temperature) {
  const std::string op = "margin_loss";
  check_dtype(op, "features", features, kInputs);
  TORCH_CHECK_VALUE(features.dim() == 2, op, ": features must be [N, d], got ", list_text(features.sizes()));
  check_dtype(op, "prototypes", prototypes, kWorking);
  TORCH_CHECK_VALUE(prototypes.dim() == 2 && prototypes.size(1) == features.size(1), op,
                    ": prototypes must be [C, d] with d = ", features.size(1), ", got ", list_text(prototypes.sizes()));
  check_device(op, "prototypes", prototypes, features);
  TORCH_CHECK_VALUE(-1 <= margin && margin <= 1, op, ": margin must be a cosine in [-1, 1], got ", margin);
  TORCH_CHECK_VALUE(temperature > 0 && std::isfinite(temperature), op,
                    ": temperature must be positive and finite, got ", temperature);
}

// One layer of rectify_ but for the values of A V, which the caller looks at; the message names the layer.
inline void check_pair(int64_t layer, const Tensor& A, const Tensor& B, const Tensor& grad_A, const Tensor& grad_B,
                       const Tensor& basis, std::string_view rectify) {
  const std::string where = "rectify_: layer " + std::to_string(layer);
  TORCH_CHECK_VALUE(A.dim() == B.dim(), where, ": A and B must be [r, n] and [m, r], or [g, r, n] and [g, m, r], got ",
                    list_text(A.sizes()), " and ", list_text(B.sizes()));
  check_factors(where, A.dim() == 2 ? A.unsqueeze(0) : A, B.dim() == 2 ? B.unsqueeze(0) : B, basis);
  check_dtype(where, "grad_A", grad_A, {A.scalar_type()});
  check_shape(where, "grad_A", grad_A, A.sizes());
  check_dtype(where, "grad_B", grad_B, {A.scalar_type()});
  check_shape(where, "grad_B", grad_B, B.sizes());
  check_device(where, "grad_A", grad_A, A);
  check_device(where, "grad_B", grad_B, A);
  check_writable(where, "grad_A", grad_A);
  check_writable(where, "grad_B", grad_B);
  TORCH_CHECK_VALUE(is_empty(basis) || rectify != "tangent", where,
                    ": rectify='tangent' with a basis needs G V, which factor gradients do not hold; use it in the "
                    "backward of lora_linear or lora_qkv");
}

inline void check_rectify_batch(at::TensorList A, at::TensorList B, at::TensorList grad_A, at::TensorList grad_B,
                                at::TensorList basis, at::ArrayRef<double> scale, std::string_view rectify,
                                double damping, double share) {
  const std::vector<int64_t> counts = {static_cast<int64_t>(A.size()),      static_cast<int64_t>(B.size()),
                                       static_cast<int64_t>(grad_A.size()), static_cast<int64_t>(grad_B.size()),
                                       static_cast<int64_t>(basis.size()),  static_cast<int64_t>(scale.size())};
  TORCH_CHECK_VALUE(std::all_of(counts.begin(), counts.end(), [&](int64_t c) { return c == counts[0]; }),
                    "rectify_: A, B, grad_A, grad_B, basis and scale must have equal lengths, got ", list_text(counts));
  for (size_t i = 0; i < A.size(); ++i) {
    check_rectify("rectify_", scale[i], rectify, damping, share);
    check_pair(static_cast<int64_t>(i), A[i], B[i], grad_A[i], grad_B[i], basis[i], rectify);
  }
  std::vector<Span> spans;
  add_spans(spans, "grad_A", grad_A, true);
  add_spans(spans, "grad_B", grad_B, true);
  add_spans(spans, "A", A, false);
  add_spans(spans, "B", B, false);
  add_spans(spans, "basis", basis, false);
  check_apart("rectify_", std::move(spans));
}

}  // namespace janus
