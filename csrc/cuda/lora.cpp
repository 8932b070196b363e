// lora_linear, lora_qkv and their backward on CUDA: the shared algebra of lora.h, on the device of the first tensor.
#include "lora.h"

#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

namespace janus {
namespace {

// A guard for any device, since the checks that refuse tensors on different devices come after it.
template <auto function>
struct OnDevice;

template <typename... Rest, Triple (*function)(const Tensor&, Rest...)>
struct OnDevice<function> {
  static Triple call(const Tensor& first, Rest... rest) {
    const c10::DeviceGuard guard(first.device());
    return function(first, rest...);
  }
};

}  // namespace
}  // namespace janus

TORCH_LIBRARY_IMPL(janus_ext, CUDA, m) {
  m.impl("lora_linear", TORCH_FN(janus::OnDevice<&janus::lora_linear>::call));
  m.impl("lora_qkv", TORCH_FN(janus::OnDevice<&janus::lora_qkv>::call));
  m.impl("lora_backward", TORCH_FN(janus::OnDevice<&janus::lora_backward>::call));
}
