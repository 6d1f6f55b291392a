// Launches compiled kernels on MLX's CUDA stream.
#pragma once

#include "core/gpu.h"

namespace segtrain {

/// A kernel compiled for this device.
struct CudaBinary {
  std::string name, binary;
};

/// The inputs that all launches of a kernel share. For each input that MLX receives, it spends time on
/// ordering launches, tracking lifetimes and adding edges to the CUDA graph. The shared inputs need none of
/// this, because they are already evaluated and contiguous. MLX therefore receives only the inputs that
/// differ between launches, and `keeper`, which keeps the shared inputs alive for as long as MLX keeps the
/// inputs of a launch.
struct FixedInputs {
  FixedInputs(Arrays all, std::vector<size_t> open);
  Arrays inputs;             ///< all inputs of the kernel; a launch replaces the ones at the indices `open`
  std::vector<size_t> open;  ///< the indices of the inputs that each launch passes, in order
  mx::array keeper;
};

/// Does the same as mx::fast::precompiled_cuda_kernel, but does not copy the binary at each launch or hash it
/// to find the loaded kernel. `binary` must never be destroyed. If `fixed` is given, `inputs` are only the
/// inputs at the indices fixed->open, the kernel has a single output, and the returned arrays are consecutive
/// parts of this output. These arrays share one allocation, which is freed with the last of them.
Arrays cuda_launch(const CudaBinary& binary, Arrays inputs, std::vector<mx::Shape> shapes,
                   std::vector<mx::Dtype> dtypes, const Grid& grid, mx::StreamOrDevice s,
                   std::shared_ptr<const FixedInputs> fixed = nullptr);

/// Allocates device memory for y.
void cuda_allocate(mx::array& y, mx::Stream s);

/// Returns the address of x's elements on the device.
void* cuda_address(const mx::array& x);

/// Adds a copy of `bytes` bytes to MLX's CUDA stream. One of the addresses may be in page-locked host memory.
void cuda_copy(void* to, const void* from, size_t bytes, mx::Stream s);

/// Returns page-locked host memory, or nullptr if there is none.
void* cuda_host_memory(size_t bytes);
void cuda_free_host_memory(void* data);

}  // namespace segtrain
