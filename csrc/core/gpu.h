// The kernels of metal/ and cuda/, whose text is embedded in the module and compiled at first use.
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

/// The CUDA compute capability of this GPU (90 means 9.0); 0 without CUDA.
int compute_capability();

/// Template arguments of a kernel, such as T (a dtype), D (an int) and CAP (a bool).
using Template = std::vector<std::pair<std::string, mx::fast::TemplateArg>>;

struct Grid {
  std::tuple<int, int, int> groups;  ///< thread groups (CUDA: blocks)
  int threads;                       ///< threads per group
  int shared_memory = 0;             ///< bytes, CUDA only
  int at_once = 1;                   ///< blocks that must fit on a core, which limits registers; CUDA only
};

/// The number of tiles of `size` that cover n.
inline int tiles(int n, int size) {
  return n / size + (n % size != 0);  // n may be INT_MAX
}

/// Returns parameters of a kernel as an array on the device. Reads of host memory would cross the bus, so the
/// parameters are copied (core/upload.h). The copy is cached, since most calls have the same parameters in
/// every layer and step.
mx::array device_ints(const std::vector<int32_t>& values);
mx::array device_floats(const std::vector<float>& values);

/// Launches kernel `name`. Of `values` it gets the inputs that its text declares. The text gets the number of
/// threads per group as THREADS.
Arrays launch(const std::string& name, const std::map<std::string, mx::array>& values,
              std::vector<mx::Shape> shapes, std::vector<mx::Dtype> dtypes, const Template& arguments,
              const Grid& grid, mx::StreamOrDevice s);

/// A CUDA launch whose kernel and fixed inputs are looked up and evaluated once. It is used in decoding,
/// where many short launches make the host the bottleneck.
class PreparedLaunch {
 public:
  /// `values` are as in launch(), except for the inputs named `open`, which each call passes; their types are
  /// those of `like`. The output is of `dtype`.
  PreparedLaunch(const std::string& name, std::map<std::string, mx::array> values,
                 const std::vector<std::string>& open, const Arrays& like, mx::Dtype dtype,
                 const Template& arguments, const Grid& grid);

  /// Returns arrays of these shapes, which are consecutive parts of the kernel's one output.
  Arrays operator()(const Arrays& open, std::vector<mx::Shape> shapes, mx::StreamOrDevice s) const;

 private:
  std::string name_;
  std::shared_ptr<const struct FixedInputs> inputs_;
  mx::Dtype dtype_;
  Grid grid_;
  const struct CudaBinary* binary_;  ///< nullptr while kernels are collected
};

/// After collect_kernels, calls on this thread only record which kernels they need, and return zeros that
/// must not be evaluated. compile_kernels ends this: it compiles the recorded kernels that are not yet
/// compiled, in parallel, and returns their number. CUDA only.
void collect_kernels();
size_t compile_kernels();
bool collects_kernels();

/// Replaces a launch in a dry run or while kernels are collected: the outputs are zeros.
Arrays dry_launch(const std::string& name, const Arrays& inputs, std::vector<mx::Shape> shapes,
                  std::vector<mx::Dtype> dtypes, mx::StreamOrDevice s);

/// A launch of a kernel on Metal, with everything that is passed to MLX.
struct MetalLaunch {
  std::string name, source, header;
  std::vector<std::pair<std::string, mx::array>> inputs;
  std::vector<std::tuple<std::string, mx::Shape, mx::Dtype>> outputs;
  Template arguments;
  std::tuple<int, int, int> grid, threadgroup;  ///< in threads
};
using RunMetal = std::function<Arrays(const MetalLaunch&)>;

/// For tests: makes calls on this thread choose implementations as on Metal, with `run` in place of the
/// device: it is called for each launch and returns the outputs. An empty `run` ends the emulation.
void emulate_metal(RunMetal run);

/// Disables a GPU kernel in this process, because it failed the self-check on this device.
void switch_off(const std::string& kernel, const std::string& reason);

/// The implementation "kernel" on a GPU. It is ok if `unfit`, the reason why the kernel does not support the
/// call, is empty, and the kernel did not fail the self-check. If this process does not have the `device`,
/// the self-check counts as passed.
Way gpu_kernel(const std::string& kernel, const std::string& unfit, Gpu device = gpu());

}  // namespace segtrain
