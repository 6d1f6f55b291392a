// Launches of compiled kernels on MLX's CUDA stream.
#pragma once

#include "core/gpu.h"

namespace segtrain {

/// A kernel compiled for this device.
struct CudaBinary {
  std::string name, binary;
};

/// Inputs of a kernel that all of its launches share. They are evaluated and contiguous, so MLX sees only a
/// launch's own inputs and `keeper`, which keeps the shared ones alive for as long as MLX keeps a launch's
/// inputs. MLX visits each input several times, for its order, its lifetime and the edges of the CUDA graph.
struct FixedInputs {
  FixedInputs(Arrays all, std::vector<size_t> open);
  Arrays inputs;             ///< all inputs of the kernel; a launch replaces those at the places `open`
  std::vector<size_t> open;  ///< the places of a launch's own inputs, in their order
  mx::array keeper;
};

/// Like mx::fast::precompiled_cuda_kernel, which copies the binary at each launch and hashes it to find the
/// loaded kernel; this function does neither. `binary` must live as long as the process.
/// With `fixed`, `inputs` are those of its open places, the kernel has one output, and the returned arrays
/// are consecutive parts of it. This takes one allocation, which is freed with the last of the arrays.
Arrays cuda_launch(const CudaBinary& binary, Arrays inputs, std::vector<mx::Shape> shapes,
                   std::vector<mx::Dtype> dtypes, const Grid& grid, mx::StreamOrDevice s,
                   std::shared_ptr<const FixedInputs> fixed = nullptr);

}  // namespace segtrain
