// A device-independent op, run on the device of its first tensor.
#pragma once

#include <c10/core/DeviceGuard.h>

#include "checks.h"

namespace janus {

// A guard for any device, since the checks that refuse tensors on different devices come after it.
template <auto function>
struct OnDevice;

template <typename Result, typename... Rest, Result (*function)(const Tensor&, Rest...)>
struct OnDevice<function> {
  static Result call(const Tensor& first, Rest... rest) {
    const c10::DeviceGuard guard(first.device());
    return function(first, rest...);
  }
};

}  // namespace janus
