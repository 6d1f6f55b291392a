// Launches of compiled kernels on MLX's CUDA stream.
#pragma once

#include "core/gpu.h"

namespace segtrain {

/// A kernel compiled for this device.
struct CudaBinary {
  std::string name, binary;
};

/// mx::fast::precompiled_cuda_kernel, without what that does at each launch: it copies the binary, and hashes
/// it to find the loaded kernel again. `binary` must live as long as the process.
/// With `joined` the kernel has one output, which holds the arrays one after the other: one allocation, and
/// an array lives as long as any of them.
Arrays cuda_launch(const CudaBinary& binary, const Arrays& inputs, std::vector<mx::Shape> shapes,
                   std::vector<mx::Dtype> dtypes, const Grid& grid, mx::StreamOrDevice s,
                   bool joined = false);

}  // namespace segtrain
