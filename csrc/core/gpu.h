// Kernels of metal/ and cuda/: text that travels inside the module and is compiled at first use.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/kernel.h"
#include "mlx/fast.h"

namespace segtrain {

/// The kind of GPU that MLX drives in this process.
Gpu gpu();

/// Its compute capability, as 90 for 9.0; 0 if it has none.
int compute_capability();

/// Template arguments of a kernel: T → dtype, D → int, CAP → bool.
using Template = std::vector<std::pair<std::string, mx::fast::TemplateArg>>;

struct Grid {
  std::tuple<int, int, int> groups;  ///< thread groups (CUDA: blocks)
  int threads;                       ///< of a group
  int shared_memory = 0;             ///< bytes, CUDA only
  int at_once = 1;                   ///< blocks that shall fit a core, which bounds registers; CUDA only
};

/// Tiles of `size` that cover n.
inline int tiles(int n, int size) {
  return n / size + (n % size != 0);  // n may be the largest int
}

/// Numbers that a kernel reads, in an array on the device. What the host writes stays in the host's memory,
/// and a kernel's reads cross the bus: they are moved once (core/upload.h) and found again, since a call's
/// numbers are the same in every layer and step.
mx::array device_ints(const std::vector<int32_t>& values);
mx::array device_floats(const std::vector<float>& values);

/// Launches kernel `name`. It takes from `values` the inputs that its text declares, and is told its threads
/// of a group as THREADS.
Arrays launch(const std::string& name, const std::map<std::string, mx::array>& values,
              std::vector<mx::Shape> shapes, std::vector<mx::Dtype> dtypes, const Template& arguments,
              const Grid& grid, mx::StreamOrDevice s);

/// A launch on CUDA whose kernel and fixed inputs are looked up once, for calls of which a step of generation
/// makes so many that the host's part is what they cost.
class PreparedLaunch {
 public:
  /// `values` as those of launch(); each call gives the `open` ones, which have the types of `like`. Output
  /// in `dtype`.
  PreparedLaunch(const std::string& name, std::map<std::string, mx::array> values,
                 const std::vector<std::string>& open, const Arrays& like, mx::Dtype dtype,
                 const Template& arguments, const Grid& grid);

  /// Arrays of these shapes, which lie one after the other in the kernel's one output.
  Arrays operator()(const Arrays& open, std::vector<mx::Shape> shapes, mx::StreamOrDevice s) const;

 private:
  std::string name_;
  Arrays inputs_;
  std::vector<size_t> open_;
  mx::Dtype dtype_;
  Grid grid_;
  const struct CudaBinary* binary_;  ///< nullptr while kernels are collected
};

/// From now on calls of this thread only say which kernels they need, and give zeros that nobody is to
/// evaluate; until compile_kernels, which compiles those that are not there yet all at once and returns how
/// many. CUDA only.
void collect_kernels();
size_t compile_kernels();
bool collects_kernels();

/// What stands in its place in a dry run: zeros.
Arrays dry_launch(const std::string& name, const Arrays& inputs, std::vector<mx::Shape> shapes,
                  std::vector<mx::Dtype> dtypes, mx::StreamOrDevice s);

/// A launch of a kernel on Metal: all that MLX is told.
struct MetalLaunch {
  std::string name, source, header;
  std::vector<std::pair<std::string, mx::array>> inputs;
  std::vector<std::tuple<std::string, mx::Shape, mx::Dtype>> outputs;
  Template arguments;
  std::tuple<int, int, int> grid, threadgroup;  ///< threads
};
using RunMetal = std::function<Arrays(const MetalLaunch&)>;

/// For tests: from now on calls of this thread take the ways of Metal, and `run` stands in for the device:
/// it is called for each launch and gives the outputs. Empty: ends it.
void emulate_metal(RunMetal run);

/// Switches a kernel of the GPU off in this process, because it failed the self-check on this device.
void switch_off(const std::string& kernel, const std::string& reason);

/// "kernel" on a GPU, that of this name: serves if `unfit` is empty (else it says what does not fit) and the
/// self-check did not fail. On a `device` that this process does not have, the self-check counts as passed.
Way gpu_kernel(const std::string& kernel, const std::string& unfit, Gpu device = gpu());

}  // namespace segtrain
