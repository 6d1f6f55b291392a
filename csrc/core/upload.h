// Copies of host data on the device.
#pragma once

#include "segtrain.h"

namespace segtrain {

/// Returns the values as an array [n] on the device. The caller evaluates it.
///
/// When MLX makes an array from host data on CUDA, it takes a device buffer from its cache and converts it to
/// memory that host and device can access, which takes more than a millisecond each time. Here this memory is
/// kept and reused. On other devices the array is made the way MLX makes it.
mx::array upload(const std::vector<int32_t>& numbers);
mx::array upload(const std::vector<float>& numbers);

}  // namespace segtrain
