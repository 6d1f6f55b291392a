#include "core/offload.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "core/binding.h"
#include "core/cuda_launch.h"
#include "core/gpu.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"

namespace segtrain {

namespace {

/// Memory that is not in use, by the index of the stream that copies it and by its size in bytes. A copy may
/// still be pending when its memory is no longer in use, so the memory is reused only on the same stream.
struct Unused {
  std::mutex lock;
  std::map<std::pair<int, size_t>, std::vector<char*>> memory;
};

Unused& unused() {
  static auto& own = *new Unused;  // outlives CUDA
  return own;
}

/// Returns the stream of this thread's copies. On a CPU, this is the default stream, because a copy would
/// gain nothing by a stream of its own.
mx::Stream copy_stream() {
  const auto own = mx::to_stream({});
  if (!on_cuda(own)) return own;
  thread_local std::map<int, mx::Stream> known;  // a stream belongs to the thread that has made it
  auto found = known.find(own.device.index);
  if (found == known.end()) found = known.emplace(own.device.index, mx::new_stream(own.device)).first;
  return found->second;
}

/// Copies its input to host memory.
class Offload : public mx::Primitive {
 public:
  Offload(mx::Stream s, std::shared_ptr<HostMemory> memory) : Primitive(s), memory_(std::move(memory)) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    outputs[0].set_data(mx::allocator::malloc(1));
    mx::cpu::get_command_encoder(stream()).dispatch([memory = memory_, from = inputs[0].data<char>()] {
      std::memcpy(memory->data(), from, memory->size());
    });
  }
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override {
    outputs[0].set_data(mx::allocator::malloc(1));
    cuda_copy(memory_->data(), cuda_address(inputs[0]), memory_->size(), stream());
  }
  const char* name() const override { return "Offload"; }

 private:
  std::shared_ptr<HostMemory> memory_;
};

/// Copies host memory to its output. Its inputs must be computed before.
class Fetch : public mx::Primitive {
 public:
  Fetch(mx::Stream s, std::shared_ptr<HostMemory> memory) : Primitive(s), memory_(std::move(memory)) {}

  void eval_cpu(const Arrays&, Arrays& outputs) override {
    outputs[0].set_data(mx::allocator::malloc(outputs[0].nbytes()));
    mx::cpu::get_command_encoder(stream()).dispatch([memory = memory_, to = outputs[0].data<char>()] {
      std::memcpy(to, memory->data(), memory->size());
    });
  }
  void eval_gpu(const Arrays&, Arrays& outputs) override {
    cuda_allocate(outputs[0], stream());
    cuda_copy(cuda_address(outputs[0]), memory_->data(), memory_->size(), stream());
  }
  const char* name() const override { return "Fetch"; }

 private:
  std::shared_ptr<HostMemory> memory_;
};

}  // namespace

HostMemory::HostMemory(size_t bytes) : data_(nullptr), size_(bytes), stream_(copy_stream().index) {
  {
    std::lock_guard guard(unused().lock);
    auto& same = unused().memory[{stream_, size_}];
    if (!same.empty()) {
      data_ = same.back();
      same.pop_back();
    }
  }
  if (!data_) data_ = static_cast<char*>(on_cuda({}) ? cuda_host_memory(bytes) : std::malloc(bytes));
  if (!data_)
    throw std::runtime_error("[offload] could not get " + std::to_string(bytes) +
                             " bytes of page-locked host memory for offloaded activations: set "
                             "activation_offloading to false, and resume the run.");
}

HostMemory::~HostMemory() {
  std::lock_guard guard(unused().lock);
  unused().memory[{stream_, size_}].push_back(data_);
}

Offloaded offload(const mx::array& x) {
  const auto dense = x.flags().row_contiguous ? x : mx::contiguous(x);
  auto memory = std::make_shared<HostMemory>(x.nbytes());
  mx::array copied({1}, mx::uint8, std::make_shared<Offload>(copy_stream(), memory), {dense});
  return {copied, memory, x.shape(), x.dtype()};
}

mx::array fetch(const Offloaded& copy) {
  return from_host(copy.memory, copy.shape, copy.dtype, {copy.copied});
}

mx::array from_host(std::shared_ptr<HostMemory> memory, mx::Shape shape, mx::Dtype dtype,
                    const Arrays& after) {
  auto primitive = std::make_shared<Fetch>(copy_stream(), std::move(memory));
  return mx::array(std::move(shape), dtype, std::move(primitive), after);
}

void release_host_memory() {
  const auto own = copy_stream();
  mx::synchronize(own);
  std::lock_guard guard(unused().lock);
  for (auto& [key, memory] : unused().memory) {
    if (key.first != own.index) continue;
    for (char* data : memory) on_cuda(own) ? cuda_free_host_memory(data) : std::free(data);
    memory.clear();
  }
}

const Binding offload_binding([](nb::module_& m) {
  m.def("release_host_memory", &release_host_memory,
        "Frees the host memory that earlier steps of this thread used for offloaded arrays.");
});

}  // namespace segtrain
