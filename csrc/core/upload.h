// Numbers of the host on the device.
#pragma once

#include "segtrain.h"

namespace segtrain {

/// Numbers as an array [n] on the device, for the caller to evaluate.
///
/// An array that MLX makes of the host's numbers gets memory that both sides reach, which CUDA takes more
/// than a millisecond to give, each time: MLX takes a buffer of the device from its cache and converts it.
/// The memory here is kept and used again. On other devices an array is made as MLX does.
mx::array upload(const std::vector<int32_t>& numbers);
mx::array upload(const std::vector<float>& numbers);

}  // namespace segtrain
