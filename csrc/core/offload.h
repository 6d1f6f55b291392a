// Moves arrays to host memory and back, beside the computation.
#pragma once

#include <memory>

#include "segtrain.h"

namespace segtrain {

/// Host memory of a fixed size. When it is destroyed, its memory is kept for later copies of this size by the
/// same thread.
class HostMemory {
 public:
  explicit HostMemory(size_t bytes);
  ~HostMemory();
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

  char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  char* data_;
  size_t size_;
  int stream_;
};

/// A copy of an array in host memory.
struct Offloaded {
  /// Evaluating this array copies the data. Its own value is undefined.
  mx::array copied;
  std::shared_ptr<HostMemory> memory;
  mx::Shape shape;
  mx::Dtype dtype;
};

/// Returns a copy of x in host memory. On CUDA, `copied` and the arrays that fetch() returns are evaluated on
/// a stream of their own, so the copies run while kernels run on the default stream. x must already be
/// evaluated or launched. The memory is page-locked on CUDA, which takes about half a second for each
/// GB; it is therefore kept and reused. Throws std::runtime_error if there is not enough of it.
Offloaded offload(const mx::array& x);

/// Copies the data back to the device.
mx::array fetch(const Offloaded& copy);

/// Returns an array on the device with the contents that `memory` has when the arrays in `after` are
/// computed.
mx::array from_host(std::shared_ptr<HostMemory> memory, mx::Shape shape, mx::Dtype dtype,
                    const Arrays& after = {});

/// Frees the host memory that is kept for later copies of this thread.
void release_host_memory();

}  // namespace segtrain
