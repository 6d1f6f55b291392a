#include "core/upload.h"

#include <nanobind/ndarray.h>

#include <algorithm>
#include <bit>

#include "core/binding.h"
#include "core/gpu.h"
#include "core/offload.h"

namespace segtrain {

namespace {

/// Waits until the copy is complete. This takes microseconds, because copies have a stream of their own and
/// need not wait for kernels.
template <typename T>
mx::array device_copy(const T* numbers, size_t count) {
  const size_t room = std::bit_ceil(std::max<size_t>(count, 16));  // few different sizes
  auto host = std::make_shared<HostMemory>(room * sizeof(T));
  std::copy_n(numbers, count, reinterpret_cast<T*>(host->data()));
  auto copy = from_host(host, {static_cast<int>(room)}, mx::TypeToDtype<T>());
  copy.eval();
  return mx::slice(copy, {0}, {static_cast<int>(count)}, mx::Device::gpu);
}

template <typename T>
mx::array upload(const T* numbers, size_t count) {
  if (on_cuda({}) && !dry_run() && count) return device_copy(numbers, count);
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
