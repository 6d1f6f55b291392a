// Replaces GPU kernels on machines without a GPU. In a dry run, CUDA kernels return zeros, and `launches`
// counts the launches that a device would need. Metal kernels are replaced by a function from a test.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <set>

#include "core/binding.h"
#include "core/gpu.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"

namespace segtrain {

int dry_run() {
  static const int capability = [] {
    const char* text = std::getenv("MLX_SEGTRAIN_DRY_RUN_CUDA");
    return text ? std::atoi(text) : 0;
  }();
  return capability;
}

namespace {

class DryKernel : public mx::Primitive {
 public:
  DryKernel(mx::Stream s, std::string name) : Primitive(s), name_(std::move(name)) {}

  void eval_cpu(const std::vector<mx::array>&, std::vector<mx::array>& outputs) override {
    for (auto& y : outputs) {
      y.set_data(mx::allocator::malloc(y.nbytes()));
      mx::cpu::get_command_encoder(stream()).dispatch(
          [data = y.data<char>(), bytes = y.nbytes()] { std::memset(data, 0, bytes); });
    }
  }
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::logic_error("[" + name_ + "] runs only in a dry run, on the CPU.");
  }
  const char* name() const override { return name_.c_str(); }

 private:
  std::string name_;
};

/// Returns the arrays that `outputs` depend on and that are not computed yet, each after its inputs. If an op
/// has several outputs, lists only one of them.
Arrays in_order(const Arrays& outputs) {
  Arrays order;
  std::set<std::uintptr_t> seen;
  std::vector<std::pair<mx::array, size_t>> path;
  auto enter = [&](const mx::array& x) {
    if (!x.has_primitive() || x.status() != mx::array::Status::unscheduled || seen.count(x.id())) return;
    seen.insert(x.id());
    for (const auto& sibling : x.siblings()) seen.insert(sibling.id());
    path.push_back({x, 0});
  };
  for (const auto& y : outputs)
    for (enter(y); !path.empty();) {
      auto& [x, next] = path.back();
      if (next < x.inputs().size()) {
        enter(mx::array(x.inputs()[next++]));
      } else {
        order.push_back(x);
        path.pop_back();
      }
    }
  return order;
}

/// Returns the number of kernels, by name, that a CUDA device would launch to compute these arrays. An op
/// whose output shares the memory of its input launches no kernel. A kernel of this package also needs one
/// copy launch for each input that is not row-contiguous. A concatenation launches one copy for each input.
std::map<std::string, int> launches(const Arrays& outputs) {
  check(dry_run(), "[launches] works only in a dry run: set MLX_SEGTRAIN_DRY_RUN_CUDA.");
  std::map<std::string, int> counts;
  const auto order = in_order(outputs);
  std::vector<Arrays> inputs;
  for (const auto& x : order) inputs.push_back(x.inputs());  // before the evaluation removes them
  for (size_t i = 0; i < order.size(); ++i) {
    auto x = order[i];
    const auto primitive = x.primitive_ptr();
    x.eval();
    auto shares = [&](const mx::array& in) { return in.size() && in.buffer().ptr() == x.buffer().ptr(); };
    if (!x.size() || std::any_of(inputs[i].begin(), inputs[i].end(), shares)) continue;
    const bool own = dynamic_cast<const DryKernel*>(primitive.get()) != nullptr;
    const std::string name = primitive->name();
    counts[name] += name == "Concatenate" ? static_cast<int>(inputs[i].size()) : 1;
    for (const auto& in : inputs[i])
      if (own && !in.flags().row_contiguous) ++counts["copy for " + name];
  }
  return counts;
}

}  // namespace

Arrays dry_launch(const std::string& name, const Arrays& inputs, std::vector<mx::Shape> shapes,
                  std::vector<mx::Dtype> dtypes, mx::StreamOrDevice s) {
  return mx::array::make_arrays(std::move(shapes), std::move(dtypes),
                                std::make_shared<DryKernel>(mx::to_stream(s), name), inputs);
}

const Binding dry_run_binding([](nb::module_& m) {
  nb::class_<MetalLaunch>(m, "MetalLaunch", "A launch of a kernel on Metal; see csrc/core/gpu.h.")
      .def_ro("name", &MetalLaunch::name)
      .def_ro("source", &MetalLaunch::source)
      .def_ro("header", &MetalLaunch::header)
      .def_prop_ro(
          "inputs", [](const MetalLaunch& launch) { return launch.inputs; }, "(name, array) for each input")
      .def_prop_ro(
          "outputs",
          [](const MetalLaunch& launch) {
            std::vector<std::tuple<std::string, std::vector<int>, mx::Dtype>> outputs;
            for (const auto& [name, shape, dtype] : launch.outputs)
              outputs.push_back({name, std::vector<int>(shape.begin(), shape.end()), dtype});
            return outputs;
          },
          "(name, shape, dtype) for each output")
      .def_ro("arguments", &MetalLaunch::arguments)
      .def_ro("grid", &MetalLaunch::grid)
      .def_ro("threadgroup", &MetalLaunch::threadgroup);
  m.def(
      "emulate_metal", [](std::optional<RunMetal> run) { emulate_metal(run.value_or(nullptr)); },
      "run"_a.none(),
      "Makes calls on this thread choose implementations as on Metal. `run` is called for each launch and "
      "must "
      "return its outputs. If `run` is None, ends the emulation. This function is meant for tests.");
  m.def("launches", &launches, "arrays"_a,
        "Evaluates these arrays in a dry run and returns the number of kernels, by name, that a CUDA device "
        "would launch for them.");
});

}  // namespace segtrain
