#include "core/upload.h"

#include <nanobind/ndarray.h>

#include <algorithm>
#include <bit>
#include <deque>
#include <map>
#include <mutex>

#include "core/binding.h"
#include "core/gpu.h"

namespace segtrain {

namespace {

/// The number of buffers of each size. They are used in turn, so the host rarely has to wait until the device
/// has read a buffer.
constexpr size_t TURNS = 4;

struct Buffer {
  mx::array host;
  mx::array copy;  ///< the last device copy of `host`
};

/// Fills the next buffer of the right size and returns a copy of it on the device. If the previous copy of
/// this buffer was never evaluated, a new buffer replaces the old one.
template <typename T>
mx::array device_copy(const T* numbers, size_t count) {
  static std::mutex lock;
  static auto& buffers = *new std::map<size_t, std::deque<Buffer>>;  // by size; outlives MLX's statics
  std::lock_guard guard(lock);
  const size_t room = std::bit_ceil(std::max<size_t>(count, 16));
  auto& own = buffers[room];
  if (own.size() == TURNS && own.front().copy.status() == mx::array::Status::unscheduled) own.pop_front();
  if (own.size() < TURNS) {
    const std::vector<T> zeros(room);  // MLX copies the zeros to host memory, which is then reused
    const mx::array host(zeros.begin(), {static_cast<int>(room)});
    own.push_front({host, host});
  }
  auto [host, copy] = own.front();
  own.pop_front();
  copy.wait();
  std::copy_n(numbers, count, host.data<T>());
  own.push_back({host, mx::add(host, mx::array(T{0}), mx::Device::gpu)});
  return mx::slice(own.back().copy, {0}, {static_cast<int>(count)}, mx::Device::gpu);
}

template <typename T>
mx::array upload(const T* numbers, size_t count) {
  if (gpu() == Gpu::cuda && !dry_run() && !on_cpu({}) && count) return device_copy(numbers, count);
  return mx::array(numbers, {static_cast<int>(count)});
}

}  // namespace

mx::array upload(const std::vector<int32_t>& numbers) {
  return upload(numbers.data(), numbers.size());
}

mx::array upload(const std::vector<float>& numbers) {
  return upload(numbers.data(), numbers.size());
}

const Binding upload_binding([](nb::module_& m) {
  using Numbers = nb::ndarray<nb::c_contig, nb::device::cpu, nb::ro>;
  m.def(
      "upload",
      [](const Numbers& x) {
        const bool floats = x.dtype() == nb::dtype<float>();
        check(floats || x.dtype() == nb::dtype<int32_t>(), "[upload] expected int32 or float32.");
        mx::Shape shape;
        for (size_t i = 0; i < x.ndim(); ++i) shape.push_back(static_cast<int>(x.shape(i)));
        auto flat = floats ? upload(static_cast<const float*>(x.data()), x.size())
                           : upload(static_cast<const int32_t*>(x.data()), x.size());
        flat = mx::reshape(flat, shape);
        mx::async_eval({flat});
        return flat;
      },
      "numbers"_a, "Copies an array of int32 or float32 from host memory to the device.");
});

}  // namespace segtrain
