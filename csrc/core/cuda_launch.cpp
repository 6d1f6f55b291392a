#include "core/cuda_launch.h"

#include "mlx/allocator.h"
#include "mlx/transforms.h"

namespace segtrain {

FixedInputs::FixedInputs(Arrays all, std::vector<size_t> open)
    : inputs(std::move(all)), open(std::move(open)), keeper(mx::array({0})) {
  Arrays pending;
  for (auto& x : inputs)
    if (!x.is_available() || !x.flags().row_contiguous) pending.push_back(x = mx::contiguous(x));
  if (!pending.empty()) mx::eval(pending);  // waits for the device
  auto& memory = mx::allocator::allocator();
  auto release = [kept = inputs, &memory](mx::allocator::Buffer own) { memory.free(own); };
  keeper = mx::array(mx::allocator::Data(memory.malloc(sizeof(int32_t)), release), {1}, mx::int32);
}

}  // namespace segtrain

#ifdef __linux__
#include <dlfcn.h>

#include <algorithm>
#include <mutex>

#include "mlx/primitives.h"

// Symbols that libmlx.so of mlx-cuda exports. They are declared here because the MLX header that declares
// them, mlx/backend/cuda/device.h, needs CUDA's headers. They are weak symbols, because libmlx.so for other
// devices does not export them.
struct CUfunc_st;
struct CUgraph_st;
struct dim3 {
  unsigned x, y, z;
};

namespace mlx::core::cu {

class CommandEncoder {
 public:
  [[gnu::weak]] void set_input_array(const array& x);
  [[gnu::weak]] void set_output_array(const array& x);
  [[gnu::weak]] void add_kernel_node_raw(CUfunc_st* function, dim3 grid, dim3 block, dim3 cluster,
                                         uint32_t shared_memory, void** arguments);
  [[gnu::weak]] void add_graph_node(CUgraph_st* graph);
};

[[gnu::weak]] CommandEncoder& get_command_encoder(Stream s);

}  // namespace mlx::core::cu

namespace segtrain {

namespace {

/// The description of a copy, which the CUDA driver calls CUDA_MEMCPY3D.
struct Copy {
  struct Side {
    size_t x = 0, y = 0, z = 0, level = 0;
    int kind = 4;  ///< CU_MEMORYTYPE_UNIFIED: the address says where the memory is
    const void* host = nullptr;
    const void* address = nullptr;
    void *array = nullptr, *reserved = nullptr;
    size_t pitch = 0, height = 0;
  } from, to;
  size_t width = 0, height = 1, depth = 1;  ///< the width is in bytes
};

/// The CUDA driver functions that we call. They are declared here so that the build does not need CUDA's
/// headers.
struct Driver {
  int (*load)(void** module, const void* image) = nullptr;
  int (*function)(CUfunc_st** function, void* module, const char* name) = nullptr;
  int (*set)(CUfunc_st* function, int attribute, int value) = nullptr;
  int (*context)(void** context) = nullptr;
  int (*make_graph)(CUgraph_st** graph, unsigned flags) = nullptr;
  int (*add_copy)(void** node, CUgraph_st* graph, void* const* before, size_t count, const Copy* copy,
                  void* context) = nullptr;
  int (*free_graph)(CUgraph_st* graph) = nullptr;
  int (*host_memory)(void** data, size_t bytes, unsigned flags) = nullptr;
  int (*free_host_memory)(void* data) = nullptr;

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    if (!library || !mx::cu::get_command_encoder) return;
    auto find = [&](auto& function, const char* symbol) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, symbol));
    };
    find(load, "cuModuleLoadData");
    find(function, "cuModuleGetFunction");
    find(set, "cuFuncSetAttribute");
    find(context, "cuCtxGetCurrent");
    find(make_graph, "cuGraphCreate");
    find(add_copy, "cuGraphAddMemcpyNode");
    find(free_graph, "cuGraphDestroy");
    find(host_memory, "cuMemHostAlloc");
    find(free_host_memory, "cuMemFreeHost");
  }
  bool found() const { return load && function && set; }
};

const Driver& driver() {
  static const Driver own;
  return own;
}

/// Loads the kernel on the current device, unless it is loaded already, and returns it. Returns nullptr if
/// loading fails.
CUfunc_st* loaded(const CudaBinary& binary, int device, int shared_memory) {
  constexpr int MOST_DYNAMIC_SHARED_MEMORY = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
  static std::mutex lock;
  static auto& known = *new std::map<std::pair<const CudaBinary*, int>, CUfunc_st*>;  // outlives CUDA
  std::lock_guard guard(lock);
  auto [found, fresh] = known.try_emplace({&binary, device}, nullptr);
  if (fresh) {
    void* module = nullptr;
    CUfunc_st* function = nullptr;
    if (!driver().load(&module, binary.binary.data()) &&
        !driver().function(&function, module, binary.name.c_str()) &&
        (shared_memory <= 48000 || !driver().set(function, MOST_DYNAMIC_SHARED_MEMORY, shared_memory))) {
      found->second = function;
    } else {
      known.erase(found);  // if the device's memory is full now, a later attempt may succeed
      return nullptr;
    }
  }
  return found->second;
}

class CudaKernel : public mx::Primitive {
 public:
  CudaKernel(mx::Stream s, const CudaBinary& binary, const Grid& grid,
             std::shared_ptr<const FixedInputs> fixed)
      : Primitive(s), binary_(binary), grid_(grid), fixed_(std::move(fixed)) {}

  void eval_cpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::logic_error("[" + binary_.name + "] is a CUDA kernel and cannot run on the CPU.");
  }

  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    if (!fixed_) return run(inputs, outputs);
    int64_t size = 0;
    for (const auto& y : outputs) size += y.size();
    Arrays whole{mx::array({static_cast<int>(size)}, outputs[0].dtype(), nullptr, {})};
    run(inputs, whole);
    int64_t begin = 0;
    for (auto& y : outputs) {
      const bool line = y.size() <= 1 || std::ranges::count(y.shape(), 1) + 1 >= std::ssize(y.shape());
      const mx::array::Flags rows{true, true, line};
      y.copy_shared_buffer(whole[0], y.strides(), rows, y.size(), begin);
      begin += y.size();
    }
  }

  void run(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
    auto* function = driver().found() ? loaded(binary_, stream().device.index, grid_.shared_memory) : nullptr;
    bool rows = function;
    for (const auto& x : inputs) rows = rows && x.flags().row_contiguous;
    if (!rows) return by_mlx(fixed_ ? completed(inputs) : inputs, outputs);
    for (auto& y : outputs) cuda_allocate(y, stream());
    auto& encoder = mx::cu::get_command_encoder(stream());
    const auto& all = fixed_ ? fixed_->inputs : inputs;
    std::vector<void*> pointers, arguments;
    pointers.reserve(all.size() + outputs.size());
    arguments.reserve(all.size() + outputs.size());
    for (const auto& x : all) pointers.push_back(cuda_address(x));
    if (fixed_)
      for (size_t i = 0; i < fixed_->open.size(); ++i) pointers[fixed_->open[i]] = cuda_address(inputs[i]);
    for (const auto& y : outputs) pointers.push_back(cuda_address(y));
    for (auto& pointer : pointers) arguments.push_back(&pointer);
    for (const auto& x : inputs) encoder.set_input_array(x);
    for (const auto& y : outputs) encoder.set_output_array(y);
    auto size = [](int n) { return static_cast<unsigned>(n); };
    const auto [x, y, z] = grid_.groups;
    encoder.add_kernel_node_raw(function, {size(x), size(y), size(z)}, {size(grid_.threads), 1, 1}, {1, 1, 1},
                                grid_.shared_memory, arguments.data());
  }

  /// Launches the kernel through MLX, which copies non-contiguous inputs and reports why a binary cannot be
  /// loaded.
  void by_mlx(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
    std::vector<mx::Shape> shapes;
    std::vector<mx::Dtype> dtypes;
    for (const auto& y : outputs) shapes.push_back(y.shape()), dtypes.push_back(y.dtype());
    mlx_kernel(binary_, inputs, shapes, dtypes, grid_, stream())[0].primitive().eval_gpu(inputs, outputs);
  }

  static Arrays mlx_kernel(const CudaBinary& binary, const Arrays& inputs, std::vector<mx::Shape> shapes,
                           std::vector<mx::Dtype> dtypes, const Grid& grid, mx::StreamOrDevice s) {
    const auto [x, y, z] = grid.groups;
    return mx::fast::precompiled_cuda_kernel(binary.name, binary.binary, inputs, shapes, dtypes, {},
                                             {x * grid.threads, y, z}, {grid.threads, 1, 1},
                                             grid.shared_memory, std::nullopt, true, s);
  }

  const char* name() const override { return binary_.name.c_str(); }

 private:
  /// Returns all inputs of the kernel: the fixed ones, and `inputs` at the open indices.
  Arrays completed(const Arrays& inputs) const {
    Arrays all = fixed_->inputs;
    for (size_t i = 0; i < fixed_->open.size(); ++i) all[fixed_->open[i]] = inputs[i];
    return all;
  }

  const CudaBinary& binary_;
  Grid grid_;
  std::shared_ptr<const FixedInputs> fixed_;
};

}  // namespace

// MLX does not export its allocator, so we evaluate masked_scatter with an empty mask, which only allocates
// its output. This adds no node to MLX's CUDA graph. Each additional node would cost the host time when it
// builds, updates and launches the graph.
void cuda_allocate(mx::array& y, mx::Stream s) {
  static std::mutex lock;
  static auto& known = *new std::map<int, std::shared_ptr<mx::Primitive>>;
  static const Arrays& inputs = *new Arrays(3, mx::zeros({0}, mx::bool_, s));  // only the mask's size is read
  std::lock_guard guard(lock);
  auto& primitive = known[s.index];
  if (!primitive) {
    const auto x = mx::array({0.0f});
    const auto last = mx::masked_scatter(x, mx::array({true}), x, s);  // a scatter, then a squeeze
    auto scatter = last.inputs().at(0).primitive_ptr();
    check(scatter->name() == std::string("MaskedScatter"), "[allocate] MLX's masked_scatter has changed.");
    primitive = scatter;
  }
  static_cast<mx::UnaryPrimitive&>(*primitive).eval_gpu(inputs, y);
}

// The address of an array's memory is the first field of the struct that describes this memory
// (mlx/backend/cuda/allocator.h).
void* cuda_address(const mx::array& x) {
  struct Memory {
    char* data;
  };
  return static_cast<const Memory*>(x.buffer().ptr())->data + x.offset();
}

// A graph with a single node is the only form in which MLX's encoder accepts a copy.
void cuda_copy(void* to, const void* from, size_t bytes, mx::Stream s) {
  CUgraph_st* graph = nullptr;
  void *context = nullptr, *node = nullptr;
  bool ok = !driver().context(&context) && !driver().make_graph(&graph, 0);
  constexpr size_t MOST = size_t{1} << 30;  // the width of a copy is limited
  for (size_t done = 0; ok && done < bytes; done += MOST) {
    Copy copy;
    copy.from.address = static_cast<const char*>(from) + done;
    copy.to.address = static_cast<char*>(to) + done;
    copy.width = std::min(MOST, bytes - done);
    ok = !driver().add_copy(&node, graph, nullptr, 0, &copy, context);
  }
  if (ok) mx::cu::get_command_encoder(s).add_graph_node(graph);  // copies the graph
  if (graph) driver().free_graph(graph);
  if (!ok) throw std::runtime_error("[offload] CUDA could not add a copy to its queue.");
}

void* cuda_host_memory(size_t bytes) {
  void* data = nullptr;
  constexpr unsigned FOR_ALL_DEVICES = 1;  // CU_MEMHOSTALLOC_PORTABLE
  return driver().host_memory && !driver().host_memory(&data, bytes, FOR_ALL_DEVICES) ? data : nullptr;
}

void cuda_free_host_memory(void* data) {
  driver().free_host_memory(data);
}

Arrays cuda_launch(const CudaBinary& binary, Arrays inputs, std::vector<mx::Shape> shapes,
                   std::vector<mx::Dtype> dtypes, const Grid& grid, mx::StreamOrDevice s,
                   std::shared_ptr<const FixedInputs> fixed) {
  if (!driver().found() && !fixed)
    return CudaKernel::mlx_kernel(binary, inputs, std::move(shapes), std::move(dtypes), grid, s);
  if (fixed) inputs.push_back(fixed->keeper);
  auto kernel = std::make_shared<CudaKernel>(mx::to_stream(s), binary, grid, std::move(fixed));
  return mx::array::make_arrays(std::move(shapes), dtypes, std::move(kernel), inputs);
}

}  // namespace segtrain

#else

namespace segtrain {

Arrays cuda_launch(const CudaBinary& binary, Arrays, std::vector<mx::Shape>, std::vector<mx::Dtype>,
                   const Grid&, mx::StreamOrDevice, std::shared_ptr<const FixedInputs>) {
  throw std::logic_error("[" + binary.name + "] is a CUDA kernel, which runs only on Linux.");
}

void cuda_allocate(mx::array&, mx::Stream) {}
void* cuda_address(const mx::array&) {
  return nullptr;
}
void cuda_copy(void*, const void*, size_t, mx::Stream) {
  throw std::logic_error("[offload] copies through CUDA run only on Linux.");
}
void* cuda_host_memory(size_t) {
  return nullptr;
}
void cuda_free_host_memory(void*) {}

}  // namespace segtrain

#endif
