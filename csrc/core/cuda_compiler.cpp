#include "core/cuda_compiler.h"

#include <dlfcn.h>

#include <memory>
#include <stdexcept>
#include <vector>

#include "core/kernel.h"

namespace segtrain {

namespace {

using Program = struct NvrtcProgram*;

/// The libnvrtc functions that we call. They are declared here so that the build does not need NVRTC's
/// header.
struct Nvrtc {
  int (*create)(Program*, const char* source, const char* name, int, const char* const*, const char* const*);
  int (*destroy)(Program*);
  int (*compile)(Program, int, const char* const* options);
  int (*log_size)(Program, size_t*);
  int (*log)(Program, char*);
  int (*cubin_size)(Program, size_t*);
  int (*cubin)(Program, char*);

  Nvrtc() {
    void* library = nullptr;
    for (const char* file : {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"})
      if ((library = dlopen(file, RTLD_LAZY | RTLD_LOCAL))) break;
    if (!library) throw std::runtime_error("[cuda] libnvrtc, CUDA's run-time compiler, was not found.");
    auto find = [&](auto& function, const char* symbol) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, symbol));
      if (!function) throw std::runtime_error(std::string("[cuda] libnvrtc does not export ") + symbol + ".");
    };
    find(create, "nvrtcCreateProgram");
    find(destroy, "nvrtcDestroyProgram");
    find(compile, "nvrtcCompileProgram");
    find(log_size, "nvrtcGetProgramLogSize");
    find(log, "nvrtcGetProgramLog");
    find(cubin_size, "nvrtcGetCUBINSize");
    find(cubin, "nvrtcGetCUBIN");
  }
};

}  // namespace

std::string compile_cuda(const std::string& name, const std::string& source, int capability) {
  static const Nvrtc nvrtc;
  Program program = nullptr;
  auto check = [&](int error, const char* what) {
    if (error)
      throw std::runtime_error("[" + name + "] " + what + " failed with NVRTC's error " +
                               std::to_string(error));
  };
  check(nvrtc.create(&program, source.c_str(), (name + ".cu").c_str(), 0, nullptr, nullptr), "reading");
  std::unique_ptr<NvrtcProgram, void (*)(Program)> owner(program, [](Program p) { nvrtc.destroy(&p); });

  // The suffix "a" enables instructions that are specific to this architecture, such as Hopper's warpgroup
  // matrix multiplications.
  auto architecture = "--gpu-architecture=sm_" + std::to_string(capability) + (capability >= 90 ? "a" : "");
  std::vector<const char*> options{architecture.c_str(), "--std=c++17",
                                   "--device-as-default-execution-space"};
  // A dry run only checks that the kernel compiles, so no optimization is needed.
  if (dry_run()) options.push_back("--Ofast-compile=max");
  size_t size = 0;
  if (nvrtc.compile(program, static_cast<int>(options.size()), options.data())) {
    check(nvrtc.log_size(program, &size), "reading the log");
    std::string log(size, ' ');
    check(nvrtc.log(program, log.data()), "reading the log");
    throw std::runtime_error("[" + name + "] does not compile for this device: " + log);
  }
  check(nvrtc.cubin_size(program, &size), "reading the binary");
  std::string binary(size, ' ');
  check(nvrtc.cubin(program, binary.data()), "reading the binary");
  return binary;
}

}  // namespace segtrain
