// What ops take in memory. Each says it in its own files, of shapes and of a device that need not be here,
// and through the choice of implementation that a call goes through; planning/costs.py adds it up.
#pragma once

#include "core/kernel.h"

namespace segtrain {

struct Device {
  std::string name;         ///< "cpu", "metal" or "cuda"
  int size;                 ///< bytes of a number in training
  int64_t workspace = 0;    ///< bytes that a library's products may take
  bool cudnn = false;       ///< the package has cuDNN's attention
  bool nax = false;         ///< MLX's own attention has kernels for neural accelerators
  bool repeatable = false;  ///< implementations whose bits vary are not taken

  Gpu gpu() const;
  mx::Dtype dtype() const { return size == 4 ? mx::float32 : mx::bfloat16; }
};

/// Bytes inside one call of an op, beyond what goes in and what comes out.
struct OpCost {
  int64_t forward = 0;   ///< most while it runs
  int64_t backward = 0;  ///< most while it goes back, with what it kept
  int64_t kept = 0;      ///< from the one to the other
};

}  // namespace segtrain
