// lora_linear, lora_qkv and their backward on the CPU: the shared algebra of lora.h.
#include "../lora.h"

#include <torch/library.h>

TORCH_LIBRARY_IMPL(janus_ext, CPU, m) {
  m.impl("lora_linear", TORCH_FN(janus::lora_linear));
  m.impl("lora_qkv", TORCH_FN(janus::lora_qkv));
  m.impl("lora_backward", TORCH_FN(janus::lora_backward<&janus::rectified>));
}
