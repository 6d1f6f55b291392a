// Launches the kernels in metal/ and cuda/. Their text is embedded in the module and compiled at first use.
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

/// Returns the kind of GPU that MLX uses in this process.
Gpu gpu();

/// Returns whether calls on this stream use CUDA.
bool on_cuda(mx::StreamOrDevice s);

/// Returns the CUDA compute capability of this GPU (90 means 9.0), or 0 without CUDA.
int compute_capability();

/// Template arguments of a kernel, such as T (a dtype), D (an int) and CAP (a bool).
using Template = std::vector<std::pair<std::string, mx::fast::TemplateArg>>;

struct Grid {
  std::tuple<int, int, int> groups;  ///< thread groups (CUDA: blocks)
  int threads;                       ///< threads per group
  int shared_memory = 0;             ///< bytes, CUDA only
  int at_once = 1;  ///< blocks that must fit on a multiprocessor together (limits registers); CUDA only
};

/// Returns the number of tiles of `size` elements that cover n elements.
inline int tiles(int n, int size) {
  return n / size + (n % size != 0);  // n may be INT_MAX
}

/// Returns a kernel's parameters as an array on the device. They are copied to the device (core/upload.h),
/// because reads from host memory would cross the bus. The copy is cached, because most calls pass the same
/// parameters in every layer and step.
mx::array device_ints(const std::vector<int32_t>& values);
mx::array device_floats(const std::vector<float>& values);

/// Launches the kernel `name` with the arrays in `values` that its text declares as inputs. The constant
/// THREADS in the text is the number of threads per group.
Arrays launch(const std::string& name, const std::map<std::string, mx::array>& values,
              std::vector<mx::Shape> shapes, std::vector<mx::Dtype> dtypes, const Template& arguments,
              const Grid& grid, mx::StreamOrDevice s);

/// A CUDA launch that looks up its kernel and evaluates its fixed inputs only once. It is used in decoding,
/// where many short launches make the host the bottleneck.
class PreparedLaunch {
 public:
  /// `values` is as in launch(), but without the inputs named in `open`, which each call passes. These inputs
  /// have the dtypes of `like`. The output has the dtype `dtype`.
  PreparedLaunch(const std::string& name, std::map<std::string, mx::array> values,
                 const std::vector<std::string>& open, const Arrays& like, mx::Dtype dtype,
                 const Template& arguments, const Grid& grid);

  /// Returns arrays of these shapes, which are consecutive parts of the kernel's single output.
  Arrays operator()(const Arrays& open, std::vector<mx::Shape> shapes, mx::StreamOrDevice s) const;

 private:
  std::string name_;
  std::shared_ptr<const struct FixedInputs> inputs_;
  mx::Dtype dtype_;
  Grid grid_;
  const struct CudaBinary* binary_;  ///< nullptr while kernels are collected
};

/// After collect_kernels, calls on this thread record which kernels they need instead of running them, and
/// return zeros that must not be evaluated. compile_kernels stops the recording, compiles in parallel the
/// recorded kernels that are not compiled yet, and returns how many it compiled. CUDA only.
void collect_kernels();
size_t compile_kernels();
bool collects_kernels();

/// Replaces a launch in a dry run or while kernels are collected; returns zeros.
Arrays dry_launch(const std::string& name, const Arrays& inputs, std::vector<mx::Shape> shapes,
                  std::vector<mx::Dtype> dtypes, mx::StreamOrDevice s);

/// Everything that MLX needs to launch a Metal kernel.
struct MetalLaunch {
  std::string name, source, header;
  std::vector<std::pair<std::string, mx::array>> inputs;
  std::vector<std::tuple<std::string, mx::Shape, mx::Dtype>> outputs;
  Template arguments;
  std::tuple<int, int, int> grid, threadgroup;  ///< in threads
};
using RunMetal = std::function<Arrays(const MetalLaunch&)>;

/// Makes calls on this thread choose implementations as on Metal, for tests. `run` replaces the device: it is
/// called for each launch and returns the outputs. An empty `run` ends the emulation.
void emulate_metal(RunMetal run);

/// Disables a GPU kernel that failed the self-check on this device, for the rest of this process.
void switch_off(const std::string& kernel, const std::string& reason);

/// Returns the implementation "kernel" for a GPU. `unfit` is the reason why the kernel does not support the
/// call, or an empty string. The implementation is ok if `unfit` is empty and the kernel has not failed the
/// self-check. If this process does not use `device`, the self-check is assumed to have passed.
Way gpu_kernel(const std::string& kernel, const std::string& unfit, Gpu device = gpu());

}  // namespace segtrain
