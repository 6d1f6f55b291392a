// Checks, the choice of an implementation, and CPU primitives. Only this file and gpu.h name backends.
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

/// Throws std::invalid_argument, which Python sees as ValueError, with the parts put together.
template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

enum class Gpu { none, metal, cuda };

/// One way to compute an op, and whether it serves the arguments at hand.
struct Way {
  std::string name;
  bool ok;
  std::string reason;  ///< why not
};

/// The name of the way to take: "auto" takes the first that serves; a named one that does not throws its
/// reason.
std::string choose(const std::string& op, const std::string& impl, const std::vector<Way>& ways);

/// $MLX_SEGTRAIN_DRY_RUN_CUDA, for tests: calls take the ways of a CUDA device of this compute capability.
/// Its kernels are compiled and not run: they give zeros. 0 if it is not set.
int dry_run();

/// Does something stand in for a Metal device in this thread? core/gpu.h
bool emulates_metal();

bool on_cpu(mx::StreamOrDevice s);

/// "kernel" of an op whose only kernel is the C++ one for the CPU.
Way cpu_kernel(mx::StreamOrDevice s);

/// Row-major memory of a CPU kernel's inputs, in order. Most are floats.
struct Inputs : std::vector<const void*> {
  const float* operator[](size_t i) const { return as<float>(i); }
  template <class T>
  const T* as(size_t i) const {
    return static_cast<const T*>(at(i));
  }
};

/// Fills the outputs, in order. Runs on the stream's thread.
using CpuRun = std::function<void(const Inputs& in, const std::vector<float*>& out)>;

/// float32 arrays that `run` will fill on the CPU. Floating inputs are made float32 and row-major first,
/// others row-major.
Arrays cpu_op(const char* name, const Arrays& inputs, std::vector<mx::Shape> shapes, CpuRun run,
              mx::StreamOrDevice s);

using Forward = std::function<Arrays(const Arrays& x)>;
using Vjp = std::function<Arrays(const Arrays& x, const Arrays& dy, const Arrays& made)>;

/// The first n arrays of forward(x), all of which go to `vjp` as `made`. With mx::custom_vjp a backward pass
/// that uses one of them makes all of them again; here it makes those that it uses.
Arrays with_vjp(const Arrays& x, size_t n, const Forward& forward, const Vjp& vjp);

/// Lets the C library keep up to 1 GB that was freed for what is asked for next. For the whole process.
void keep_freed_memory();

/// x, which exists once `others` do. MLX leaves to the end what only results of a graph need, such as
/// gradients of factors, and keeps until then what they are made of.
mx::array after(const mx::array& x, const Arrays& others);

/// x as float32.
mx::array f32(const mx::array& x, mx::StreamOrDevice s);

}  // namespace segtrain
