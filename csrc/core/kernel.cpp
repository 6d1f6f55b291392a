#include "core/kernel.h"

#ifdef __linux__
#include <malloc.h>
#endif

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"

namespace segtrain {

std::string choose(const std::string& op, const std::string& impl, const std::vector<Way>& ways) {
  std::string names;
  for (const auto& way : ways) {
    if (impl == "auto" ? way.ok : way.name == impl) {
      check(way.ok, "[", op, "] impl='", impl, "' does not support this call: ", way.reason, ".");
      return way.name;
    }
    names += ", '" + way.name + "'";
  }
  check(false, "[", op, "] impl must be 'auto', 'reference'", names, "; got '", impl, "'.");
  return {};
}

bool on_cpu(mx::StreamOrDevice s) {
  return !dry_run() && !emulates_metal() && mx::to_stream(s).device == mx::Device::cpu;
}

Way cpu_kernel(mx::StreamOrDevice s) {
  return {"kernel", on_cpu(s), "its only kernel is for the CPU"};
}

namespace {

class CpuOp : public mx::Primitive {
 public:
  CpuOp(mx::Stream stream, const char* name, CpuRun run)
      : Primitive(stream), name_(name), run_(std::make_shared<CpuRun>(std::move(run))) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    Inputs in;
    std::vector<float*> out;
    for (const auto& x : inputs) in.push_back(x.data<char>());
    for (auto& y : outputs) {
      y.set_data(mx::allocator::malloc(y.nbytes()));
      out.push_back(y.data<float>());
    }
    // MLX keeps inputs and outputs alive until the tasks of their primitive have finished.
    mx::cpu::get_command_encoder(stream()).dispatch([run = run_, in, out] { (*run)(in, out); });
  }
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::logic_error(std::string("[") + name_ + "] is a CPU kernel and cannot run on a GPU.");
  }
  const char* name() const override { return name_; }

 private:
  const char* name_;
  std::shared_ptr<CpuRun> run_;
};

}  // namespace

Arrays cpu_op(const char* name, const Arrays& inputs, std::vector<mx::Shape> shapes, CpuRun run,
              mx::StreamOrDevice s) {
  Arrays rows;
  for (const auto& x : inputs) {
    bool floats = mx::issubdtype(x.dtype(), mx::floating);
    rows.push_back(mx::contiguous(floats ? f32(x, s) : x, false, s));
  }
  const std::vector<mx::Dtype> dtypes(shapes.size(), mx::float32);
  return mx::array::make_arrays(std::move(shapes), dtypes,
                                std::make_shared<CpuOp>(mx::to_stream(s), name, std::move(run)), rows);
}

mx::array after(const mx::array& x, const Arrays& others) {
  return others.empty() ? x : mx::depends({x}, others)[0];
}

mx::array f32(const mx::array& x, mx::StreamOrDevice s) {
  return mx::astype(x, mx::float32, s);
}

Arrays with_vjp(const Arrays& x, size_t n, const Forward& forward, const Vjp& vjp) {
  Arrays all = x;
  for (const auto& y : forward(x)) all.push_back(mx::stop_gradient(y));
  auto part = [](const Arrays& all, size_t begin, size_t end) {
    return Arrays(all.begin() + begin, all.begin() + end);
  };
  auto outputs = [=, at = x.size()](const Arrays& in) { return part(in, at, at + n); };
  auto back = [=, at = x.size()](const Arrays& in, const Arrays& dy, const Arrays&) {
    return vjp(part(in, 0, at), dy, part(in, at, in.size()));
  };
  auto no_jvp = [](const Arrays&, const Arrays&, const std::vector<int>&) -> Arrays {
    throw std::invalid_argument("[jvp] is not implemented.");
  };
  return mx::custom_function(outputs, back, no_jvp)(all);
}

void keep_freed_memory() {
#ifdef __GLIBC__
  // By default the C library immediately returns large blocks to the operating system, which then clears
  // every page again before the next op can use it. In a pass over 50 MB, clearing takes four fifths of the
  // time.
  constexpr int most = 1 << 30;
  mallopt(M_MMAP_THRESHOLD, most);
  mallopt(M_TRIM_THRESHOLD, most);
#endif
}

}  // namespace segtrain
