// A device-independent op, run on the device of its first tensor.
#pragma once

#include <c10/core/DeviceGuard.h>

#include <optional>

#include "checks.h"

namespace janus {

// A guard for any device, and for none, since the checks come after it: of tensors on different devices, and of None,
// which the dispatcher lets pass for a tensor.
template <auto function>
struct OnDevice;

template <typename Result, typename... Rest, Result (*function)(const Tensor&, Rest...)>
struct OnDevice<function> {
  static Result call(const Tensor& first, Rest... rest) {
    const c10::OptionalDeviceGuard guard(first.defined() ? std::optional(first.device()) : std::nullopt);
    return function(first, rest...);
  }
};

}  // namespace janus
