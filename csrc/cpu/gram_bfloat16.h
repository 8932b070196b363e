// C <- decay C + X^T X on and above the diagonal, for bfloat16 X [N, n] and float32 C [n, n], both contiguous; entries
// just below the diagonal change, too. By AVX-512's dot product of bfloat16 pairs, which sums in float32.
#pragma once

#include <ATen/core/Tensor.h>

namespace janus {

// Whether the processor has it, and ATEN_CPU_CAPABILITY does not forbid it.
bool has_bfloat16_dot();

void add_upper_triangle_bfloat16(const at::Tensor& C, const at::Tensor& X, double decay);

}  // namespace janus
