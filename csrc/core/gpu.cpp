#include "core/gpu.h"

#include <atomic>
#include <future>
#include <mutex>
#include <thread>
#include <unordered_map>

#include "core/cuda_compiler.h"
#include "core/cuda_launch.h"
#include "core/upload.h"
#include "kernel_texts.h"
#include "mlx/backend/cuda/cuda.h"
#include "mlx/backend/gpu/device_info.h"
#include "mlx/backend/metal/metal.h"

namespace segtrain {

Gpu gpu() {
  if (emulates_metal()) return Gpu::metal;
  static const Gpu kind = dry_run()                   ? Gpu::cuda
                          : mx::metal::is_available() ? Gpu::metal
                          : mx::cu::is_available()    ? Gpu::cuda
                                                      : Gpu::none;
  return kind;
}

bool on_cuda(mx::StreamOrDevice s) {
  return gpu() == Gpu::cuda && !on_cpu(s);
}

int compute_capability() {
  static const int capability = [] {
    if (dry_run()) return dry_run();
    if (gpu() != Gpu::cuda) return 0;
    const auto& info = mx::gpu::device_info(0);
    auto number = [&](const char* key) { return static_cast<int>(std::get<size_t>(info.at(key))); };
    return number("compute_capability_major") * 10 + number("compute_capability_minor");
  }();
  return capability;
}

namespace {

struct Text {
  std::vector<std::string> inputs, outputs;
  std::string source, header;
};

std::vector<std::string> words(const std::string& line) {
  std::istringstream in(line);
  std::vector<std::string> all;
  for (std::string word; in >> word;) all.push_back(word);
  return all;
}

/// Reads the kernels in a file, which consists of a header and kernels. Each kernel is a line "//: name:
/// inputs -> outputs" followed by its body.
void parse(const std::string& file, const std::string& prelude, std::map<std::string, Text>& kernels) {
  const std::string mark = "\n//: ";
  size_t at = file.find(mark);
  const std::string header = prelude + file.substr(0, at + 1);  // with its last newline
  while (at != std::string::npos) {
    size_t begin = at + mark.size(), colon = file.find(": ", begin), arrow = file.find(" -> ", colon);
    size_t line_end = file.find('\n', arrow);
    at = file.find(mark, line_end);
    kernels[file.substr(begin, colon - begin)] = {words(file.substr(colon + 2, arrow - colon - 2)),
                                                  words(file.substr(arrow + 4, line_end - arrow - 4)),
                                                  file.substr(line_end, at - line_end), header};
  }
}

const Text& text_of(const std::string& name) {
  static const auto [metal, cuda] = [] {
    std::map<std::string, Text> metal, cuda;
    for (const char* file : texts::metal) parse(file, "", metal);
    for (const char* file : texts::cuda) parse(file, texts::cuda_prelude, cuda);
    return std::pair(metal, cuda);
  }();
  const auto& kernels = gpu() == Gpu::metal ? metal : cuda;
  auto found = kernels.find(name);
  if (found == kernels.end()) throw std::logic_error("[" + name + "] has no kernel text for this device.");
  return found->second;
}

std::mutex off_lock;
std::map<std::string, std::string> off;  // kernel → reason

template <typename T>
mx::array device_numbers(const std::vector<T>& values) {
  static std::mutex lock;
  static auto& known = *new std::map<std::vector<T>, mx::array>;  // never destroyed: outlives MLX's statics
  static size_t held = 0;
  std::lock_guard guard(lock);
  auto found = known.find(values);
  if (found != known.end()) return found->second;
  // Arrays that describe long or packed rows differ in every step, so the cache must be limited in size.
  if (known.size() >= 1024 || held > (2 << 20)) known.clear(), held = 0;
  held += values.size();
  auto array = upload(values);
  array.eval();  // because other threads and streams may use the array
  return known.emplace(values, array).first->second;
}

/// Returns the name that the kernels in cuda/ use for a dtype.
std::string cuda_type(const mx::Dtype& dtype) {
  if (dtype == mx::bool_) return "bool";
  if (dtype == mx::uint8) return "unsigned char";
  if (dtype == mx::uint32) return "unsigned";
  if (dtype == mx::int32) return "int";
  if (dtype == mx::float32) return "float";
  if (dtype == mx::float16) return "half";
  check(dtype == mx::bfloat16, "[cuda] no kernel supports ", dtype, ".");
  return "bfloat16";
}

/// Returns the kernel's text as one function, with the template arguments as constants. The number of threads
/// and the bytes of shared memory, which the host has computed, are also constants; static assertions in the
/// text check them.
std::string cuda_source(const std::string& name, const Text& text, const Arrays& inputs,
                        const std::vector<mx::Dtype>& dtypes, const Template& arguments, const Grid& grid) {
  std::string source =
      text.header + "\nnamespace segtrain {\nextern \"C\" __global__ void __launch_bounds__(" +
      std::to_string(grid.threads) + ", " + std::to_string(grid.at_once) + ")\n" + name + "(";
  for (size_t i = 0; i < inputs.size(); ++i)
    source += "const " + cuda_type(inputs[i].dtype()) + "* " + text.inputs[i] + ", ";
  for (size_t i = 0; i < dtypes.size(); ++i)
    source += (i ? ", " : "") + cuda_type(dtypes[i]) + "* " + text.outputs[i];
  source += ") {\n";
  for (const auto& [key, value] : arguments) {
    if (auto dtype = std::get_if<mx::Dtype>(&value))
      source += "using " + key + " = " + cuda_type(*dtype) + ";\n";
    else if (auto number = std::get_if<int>(&value))
      source += "constexpr int " + key + " = " + std::to_string(*number) + ";\n";
    else
      source += "constexpr bool " + key + (std::get<bool>(value) ? " = true;\n" : " = false;\n");
  }
  source += "constexpr int THREADS = " + std::to_string(grid.threads) +
            ", SHARED_BYTES = " + std::to_string(grid.shared_memory) + ";\n";
  return source + text.source + "\n}\n}\n";
}

/// The compiled binaries for this device, and the sources of collected kernels, which are not compiled yet.
/// Each kernel is compiled once per process. We do not use MLX's JIT, because it compiles headers for every
/// kernel, which takes two seconds, and because it does not support launch bounds.
struct Binaries {
  struct Source {
    std::string name, text;
  };
  std::mutex lock;
  std::unordered_map<std::string, CudaBinary> known;
  std::unordered_map<std::string, Source> wanted;
};
Binaries& binaries() {
  static auto& all = *new Binaries;  // never destroyed, because graphs that exist at exit refer to it
  return all;
}

/// Whether calls on this thread record the kernels that they need instead of running them.
thread_local bool collects = false;

/// Returns the kernel's binary, or nullptr if kernels are being collected and this kernel is not compiled
/// yet.
const CudaBinary* cuda_binary(const std::string& name, const Text& text, const Arrays& inputs,
                              const std::vector<mx::Dtype>& dtypes, const Template& arguments,
                              const Grid& grid) {
  // The arguments are appended as raw bytes, because formatting them as text would take longer than the
  // launch.
  std::string key = name + ' ';
  auto add = [&](auto x) { key.append(reinterpret_cast<const char*>(&x), sizeof x); };
  for (int x : {grid.threads, grid.shared_memory, grid.at_once}) add(x);
  for (const auto& x : inputs) add(x.dtype().val());
  for (const auto& dtype : dtypes) add(dtype.val());
  for (const auto& [_, value] : arguments)
    if (auto dtype = std::get_if<mx::Dtype>(&value))
      add(dtype->val());
    else if (auto number = std::get_if<int>(&value))
      add(*number);
    else
      add(std::get<bool>(value));
  auto& all = binaries();
  std::lock_guard guard(all.lock);
  auto found = all.known.find(key);
  if (found == all.known.end()) {
    auto source = cuda_source(name, text, inputs, dtypes, arguments, grid);
    if (collects) return all.wanted.insert({key, {name, source}}), nullptr;
    CudaBinary made{name, compile_cuda(name, source, compute_capability())};
    found = all.known.emplace(key, std::move(made)).first;
  }
  return &found->second;
}

thread_local RunMetal metal_stand_in;

Arrays emulated_launch(const std::string& name, const Text& text, const Arrays& inputs,
                       const std::vector<mx::Shape>& shapes, const std::vector<mx::Dtype>& dtypes,
                       const Template& arguments, std::tuple<int, int, int> threads,
                       std::tuple<int, int, int> group) {
  MetalLaunch record{name, text.source, text.header, {}, {}, arguments, threads, group};
  for (size_t i = 0; i < inputs.size(); ++i) record.inputs.push_back({text.inputs[i], inputs[i]});
  for (size_t i = 0; i < shapes.size(); ++i)
    record.outputs.push_back({text.outputs[i], shapes[i], dtypes[i]});
  return metal_stand_in(record);
}

}  // namespace

bool emulates_metal() {
  return static_cast<bool>(metal_stand_in);
}

void emulate_metal(RunMetal run) {
  metal_stand_in = std::move(run);
}

mx::array device_ints(const std::vector<int32_t>& values) {
  return device_numbers(values);
}

mx::array device_floats(const std::vector<float>& values) {
  return device_numbers(values);
}

Arrays launch(const std::string& name, const std::map<std::string, mx::array>& values,
              std::vector<mx::Shape> shapes, std::vector<mx::Dtype> dtypes, const Template& arguments,
              const Grid& grid, mx::StreamOrDevice s) {
  const auto& text = text_of(name);
  Arrays inputs;
  for (const auto& input : text.inputs) inputs.push_back(values.at(input));
  auto [x, y, z] = grid.groups;
  const std::tuple threads{x * grid.threads, y, z}, group{grid.threads, 1, 1};
  if (gpu() == Gpu::cuda) {
    const auto* binary = cuda_binary(name, text, inputs, dtypes, arguments, grid);
    if (!dry_run() && !collects)
      return cuda_launch(*binary, inputs, std::move(shapes), std::move(dtypes), grid, s);
    return dry_launch(name, inputs, std::move(shapes), std::move(dtypes), s);
  }
  auto told = arguments;
  told.push_back({"THREADS", grid.threads});
  if (emulates_metal()) return emulated_launch(name, text, inputs, shapes, dtypes, told, threads, group);
  // MLX caches compiled kernels by name, so a hash of the text is part of the name.
  auto unique = name + "_" + std::to_string(std::hash<std::string>{}(text.header + text.source) & 0xffffffff);
  auto kernel = mx::fast::metal_kernel(unique, text.inputs, text.outputs, text.source, text.header);
  return kernel(inputs, shapes, dtypes, threads, group, told, std::nullopt, false, s);
}

PreparedLaunch::PreparedLaunch(const std::string& name, std::map<std::string, mx::array> values,
                               const std::vector<std::string>& open, const Arrays& like, mx::Dtype dtype,
                               const Template& arguments, const Grid& grid)
    : name_(name), dtype_(dtype), grid_(grid) {
  const auto& text = text_of(name);
  for (size_t i = 0; i < open.size(); ++i) values.insert_or_assign(open[i], like[i]);
  Arrays inputs;
  for (const auto& input : text.inputs) inputs.push_back(values.at(input));
  std::vector<size_t> places;
  for (const auto& input : open)
    places.push_back(std::find(text.inputs.begin(), text.inputs.end(), input) - text.inputs.begin());
  binary_ = cuda_binary(name, text, inputs, {dtype}, arguments, grid);
  for (size_t i : places) inputs[i] = device_ints({0});  // otherwise the arrays in `like` would stay alive
  inputs_ = std::make_shared<FixedInputs>(std::move(inputs), std::move(places));
}

Arrays PreparedLaunch::operator()(const Arrays& open, std::vector<mx::Shape> shapes,
                                  mx::StreamOrDevice s) const {
  std::vector<mx::Dtype> dtypes(shapes.size(), dtype_);
  if (dry_run() || !binary_) return dry_launch(name_, open, std::move(shapes), std::move(dtypes), s);
  return cuda_launch(*binary_, open, std::move(shapes), std::move(dtypes), grid_, s, inputs_);
}

bool collects_kernels() {
  return collects;
}

void collect_kernels() {
  collects = true;
}

size_t compile_kernels() {
  collects = false;
  auto& all = binaries();
  std::lock_guard guard(all.lock);
  std::vector<std::future<void>> running;
  std::vector<std::pair<std::string, std::string>> made(all.wanted.size());
  std::atomic<size_t> next = 0;
  std::vector<std::pair<std::string, Binaries::Source>> wanted(all.wanted.begin(), all.wanted.end());
  auto work = [&] {
    for (size_t i; (i = next++) < wanted.size();) try {
        made[i] = {wanted[i].first,
                   compile_cuda(wanted[i].second.name, wanted[i].second.text, compute_capability())};
      } catch (const std::runtime_error&) {  // the call that needs this kernel reports the error
      }
  };
  const size_t threads = std::min<size_t>(wanted.size(), std::max(1u, std::thread::hardware_concurrency()));
  for (size_t i = 0; i < threads; ++i) running.push_back(std::async(std::launch::async, work));
  for (auto& own : running) own.get();
  for (auto& [key, binary] : made)
    if (!binary.empty()) all.known.emplace(key, CudaBinary{all.wanted[key].name, std::move(binary)});
  all.wanted.clear();
  return made.size();
}

void switch_off(const std::string& kernel, const std::string& reason) {
  std::lock_guard lock(off_lock);
  off[kernel] = reason;
}

Way gpu_kernel(const std::string& kernel, const std::string& unfit, Gpu device) {
  if (device == Gpu::none) return {"kernel", false, "there is no GPU"};
  if (!unfit.empty()) return {"kernel", false, unfit};
  if (device != gpu()) return {"kernel", true, ""};
  std::lock_guard lock(off_lock);
  auto found = off.find(kernel);
  if (found != off.end())
    return {"kernel", false, "it failed the self-check on this device: " + found->second};
  return {"kernel", true, ""};
}

}  // namespace segtrain
