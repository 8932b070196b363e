// lora_linear, lora_qkv and their backward on CUDA: the shared algebra of lora.h, on the device of the first tensor,
// with what is r x r by the kernels of rectify_.
#include "lora.h"

#include <torch/library.h>

#include "on_device.h"
#include "rectify.h"

TORCH_LIBRARY_IMPL(janus_ext, CUDA, m) {
  m.impl("lora_linear", TORCH_FN(janus::OnDevice<&janus::lora_linear>::call));
  m.impl("lora_qkv", TORCH_FN(janus::OnDevice<&janus::lora_qkv>::call));
  m.impl("lora_backward", TORCH_FN(janus::OnDevice<&janus::lora_backward<&janus::rectified_on_device>>::call));
}
