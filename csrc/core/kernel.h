// Argument checks, the choice of an implementation, and CPU primitives.
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "segtrain.h"

namespace segtrain {

inline std::ostream& operator<<(std::ostream& os, const mx::Shape& shape) {
  os << "(";
  for (size_t i = 0; i < shape.size(); ++i) os << (i ? "," : "") << shape[i];
  return os << ")";
}

/// Throws std::invalid_argument (ValueError in Python) if `ok` is false. The message is the concatenation of
/// `parts`.
template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

enum class Gpu { none, metal, cuda };

/// An implementation of an op, and whether it supports the given arguments.
struct Way {
  std::string name;
  bool ok;
  std::string reason;  ///< why it does not support the arguments
};

/// Returns the name of the implementation to use. If `impl` is "auto", this is the first implementation that
/// is ok. Otherwise it is `impl`; if that implementation is not ok, throws an error with the reason.
std::string choose(const std::string& op, const std::string& impl, const std::vector<Way>& ways);

/// Returns the compute capability in $MLX_SEGTRAIN_DRY_RUN_CUDA, or 0 if the variable is not set. Tests set
/// it to make calls choose implementations as on a CUDA device with this compute capability. Kernels are then
/// compiled but not run, and their outputs are zeros.
int dry_run();

/// Whether this thread emulates a Metal device; see emulate_metal in core/gpu.h.
bool emulates_metal();

bool on_cpu(mx::StreamOrDevice s);

/// Returns the implementation "kernel" for an op whose only kernel is the C++ kernel for the CPU.
Way cpu_kernel(mx::StreamOrDevice s);

/// Pointers to a CPU kernel's row-major inputs, in order. Most inputs are floats.
struct Inputs : std::vector<const void*> {
  const float* operator[](size_t i) const { return as<float>(i); }
  template <class T>
  const T* as(size_t i) const {
    return static_cast<const T*>(at(i));
  }
};

/// Computes a CPU op: fills the output buffers `out`, in order. The function runs on the stream's thread.
using CpuRun = std::function<void(const Inputs& in, const std::vector<float*>& out)>;

/// Returns float32 arrays that `run` fills on the CPU. Floating inputs are first converted to float32, and
/// all inputs are made row-major.
Arrays cpu_op(const char* name, const Arrays& inputs, std::vector<mx::Shape> shapes, CpuRun run,
              mx::StreamOrDevice s);

using Forward = std::function<Arrays(const Arrays& x)>;
using Vjp = std::function<Arrays(const Arrays& x, const Arrays& dy, const Arrays& made)>;

/// Returns the first n arrays of forward(x). Their gradients are computed by `vjp`, which receives all arrays
/// of forward(x) as `made`. With mx::custom_vjp, a backward pass that uses one of these arrays would
/// recompute all of them; here, it recomputes only the arrays that it uses.
Arrays with_vjp(const Arrays& x, size_t n, const Forward& forward, const Vjp& vjp);

/// Lets the C library keep up to 1 GB of freed memory for later allocations. This affects the whole process.
void keep_freed_memory();

/// Returns x, but makes it available only after `others` are computed. Otherwise MLX would compute results
/// that no other op reads, such as the gradients of LoRA factors, only at the end of the evaluation, and keep
/// their inputs alive until then.
mx::array after(const mx::array& x, const Arrays& others);

/// Returns x as float32.
mx::array f32(const mx::array& x, mx::StreamOrDevice s);

}  // namespace segtrain
