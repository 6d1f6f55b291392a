// Copies data from host memory to the device.
#pragma once

#include "segtrain.h"

namespace segtrain {

/// Returns the values as an array [n] on the device. The caller must evaluate the array.
///
/// When MLX creates an array from host data on CUDA, it converts a device buffer from its cache to memory
/// that both host and device can access. The conversion takes more than a millisecond each time, and the
/// first kernel that reads this memory takes most of another. This function copies from page-locked memory,
/// which it keeps and reuses. On other devices it creates the array as MLX does.
mx::array upload(const std::vector<int32_t>& numbers);
mx::array upload(const std::vector<float>& numbers);

}  // namespace segtrain
