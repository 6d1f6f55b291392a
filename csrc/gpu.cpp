#include "gpu.h"

#include <mutex>

#include "kernel_texts.h"
#include "mlx/backend/cuda/cuda.h"
#include "mlx/backend/gpu/device_info.h"
#include "mlx/backend/metal/metal.h"

namespace segtrain {

Gpu gpu() {
  static const Gpu kind = mx::metal::is_available() ? Gpu::metal
                          : mx::cu::is_available()  ? Gpu::cuda
                                                    : Gpu::none;
  return kind;
}

int compute_capability() {
  static const int capability = [] {
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

/// A file is a header and, each behind a line "//: name: inputs -> outputs", the bodies of its kernels.
void parse(const std::string& file, const std::string& prelude, std::map<std::string, Text>& kernels) {
  const std::string mark = "\n//: ";
  size_t at = file.find(mark);
  const std::string header = prelude + file.substr(0, at + 1);  // with the end of its last line
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
  static const std::map<std::string, Text> kernels = [] {
    std::map<std::string, Text> all;
    if (gpu() == Gpu::metal)
      for (const char* file : texts::metal) parse(file, "", all);
    if (gpu() == Gpu::cuda)
      for (const char* file : texts::cuda) parse(file, texts::cuda_prelude, all);
    return all;
  }();
  auto found = kernels.find(name);
  if (found == kernels.end()) throw std::logic_error("[" + name + "] has no kernel text for this device.");
  return found->second;
}

std::mutex off_lock;
std::map<std::string, std::string> off;  // "op impl" → reason

}  // namespace

Arrays launch(const std::string& name, const std::map<std::string, mx::array>& values,
              std::vector<mx::Shape> shapes, std::vector<mx::Dtype> dtypes, const Template& arguments,
              const Grid& grid, mx::StreamOrDevice s) {
  const auto& text = text_of(name);
  Arrays inputs;
  for (const auto& input : text.inputs) inputs.push_back(values.at(input));
  std::string header = text.header;
  if (grid.at_once) {
    // MLX writes the kernel's signature and has no place for its launch bounds.
    header += "#undef __global__\n#define __global__ __location__(global) __launch_bounds__(" +
              std::to_string(grid.threads) + ", " + std::to_string(grid.at_once) + ")\n";
  }
  // MLX keeps compiled kernels by name, on disk as well: the text is part of the name.
  auto unique = name + "_" + std::to_string(std::hash<std::string>{}(header + text.source) & 0xffffffff);
  auto kernel = gpu() == Gpu::metal
                    ? mx::fast::metal_kernel(unique, text.inputs, text.outputs, text.source, header)
                    : mx::fast::cuda_kernel(unique, text.inputs, text.outputs, text.source, header, true,
                                            grid.shared_memory);
  auto [x, y, z] = grid.groups;
  return kernel(inputs, shapes, dtypes, {x * grid.threads, y, z}, {grid.threads, 1, 1}, arguments,
                std::nullopt, false, s);
}

void switch_off(const std::string& op, const std::string& impl, const std::string& reason) {
  std::lock_guard lock(off_lock);
  off[op + " " + impl] = reason;
}

Way gpu_kernel(const std::string& op, const std::string& unfit) {
  if (gpu() == Gpu::none) return {"kernel", false, "there is no GPU"};
  if (!unfit.empty()) return {"kernel", false, unfit};
  std::lock_guard lock(off_lock);
  auto found = off.find(op + " kernel");
  if (found != off.end())
    return {"kernel", false, "it failed the self-check on this device: " + found->second};
  return {"kernel", true, ""};
}

}  // namespace segtrain
