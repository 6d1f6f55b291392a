// Describes how much memory ops need. Each op's source file computes the memory of the op from shapes and
// from the properties of a device, for the implementation that a call on that device would choose. The device
// need not be in this machine. planning/costs.py adds up the memory of all ops.
#pragma once

#include "core/kernel.h"

namespace segtrain {

struct Device {
  std::string name;         ///< "cpu", "metal" or "cuda"
  int size;                 ///< bytes per element in training
  int64_t workspace = 0;    ///< maximum workspace of library matrix products, in bytes
  bool cudnn = false;       ///< the package includes cuDNN's attention
  bool nax = false;         ///< MLX's attention has kernels for the neural accelerators
  bool repeatable = false;  ///< use only implementations whose results are bit-identical when repeated
  int64_t host = 0;         ///< bytes of host memory that offloaded arrays may use

  Gpu gpu() const;
  mx::Dtype dtype() const { return size == 4 ? mx::float32 : mx::bfloat16; }
};

/// The memory, in bytes, that one call of an op needs in addition to its inputs and outputs.
struct OpCost {
  int64_t forward = 0;   ///< peak during its forward pass
  int64_t backward = 0;  ///< peak during its backward pass, including the arrays kept from the forward pass
  int64_t kept = 0;      ///< kept between the two passes
};

}  // namespace segtrain
