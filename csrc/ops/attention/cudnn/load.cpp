// Loads the library _cudnn.so, which is next to _core, on first use. This is the only file of
// csrc/ops/attention/cudnn/ that is compiled into _core.
#include <dlfcn.h>

#include "core/gpu.h"
#include "ops/attention/cudnn/cudnn.h"

namespace segtrain {

namespace {

struct Library {
  const CudnnAttention* attention = nullptr;
  std::string reason;
};

const Library& library() {
  static const Library loaded = [] {
    if (gpu() != Gpu::cuda) return Library{nullptr, "it needs an NVIDIA GPU"};
    Dl_info self{};
    dladdr(reinterpret_cast<const void*>(&cudnn_way), &self);
    std::string file = self.dli_fname;
    file = file.substr(0, file.rfind('/') + 1) + "_cudnn.so";
    void* handle = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
    void* entry = handle ? dlsym(handle, "segtrain_cudnn_attention") : nullptr;
    if (!entry) return Library{nullptr, std::string("its library cannot be loaded (") + dlerror() + ")"};
    auto attention = reinterpret_cast<decltype(&segtrain_cudnn_attention)>(entry)(device_ints);
    return Library{attention, attention ? "" : "libcudnn.so.9 cannot be loaded"};
  }();
  return loaded;
}

}  // namespace

bool has_cudnn() {
  return library().attention;
}

Way cudnn_way(const Call& c) {
  if (c.device != Gpu::cuda) return {"cudnn", false, "it needs an NVIDIA GPU"};
  if (!library().attention) return {"cudnn", false, library().reason};
  Way way = gpu_kernel("attention_cudnn", library().attention->unfit(c));
  way.name = "cudnn";
  return way;
}

const AttentionWay& cudnn_attention() {
  return library().attention->way;
}

}  // namespace segtrain
