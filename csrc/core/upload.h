// Numbers of the host on the device.
#pragma once

#include "segtrain.h"

namespace segtrain {

/// A copy on the device of `count` numbers of 4 bytes, int32 or float32, as an array of one axis. It may
/// still be under way.
///
/// An array that MLX makes of the host's numbers gets memory that both sides reach, which CUDA takes more
/// than a millisecond to give, each time: MLX takes a buffer of the device from its cache and converts it.
/// The memory here is kept and used again. On other devices an array is made as MLX does.
mx::array upload(const void* numbers, size_t count, mx::Dtype dtype);

}  // namespace segtrain
