// Concatenates many small arrays. On CUDA one launch copies up to 64 arrays, whereas MLX launches one copy
// per array.
#include "core/binding.h"
#include "core/gpu.h"
#include "segtrain.h"

namespace segtrain {

mx::array join(const Arrays& arrays, mx::StreamOrDevice s) {
  constexpr size_t AT_ONCE = 64;  // number of arrays per launch, as in cuda/join.cu
  constexpr int THREADS = 256, OF_A_THREAD = 16;
  check(!arrays.empty(), "[join] expected at least one array.");
  Arrays flat;
  for (const auto& x : arrays) flat.push_back(mx::reshape(f32(x, s), {-1}, s));
  if (!on_cuda(s) || !gpu_kernel("join", "").ok) return mx::concatenate(flat, 0, s);
  Arrays joined;
  for (size_t begin = 0; begin < flat.size(); begin += AT_ONCE) {
    const int n = static_cast<int>(std::min(AT_ONCE, flat.size() - begin));
    std::map<std::string, mx::array> values;
    std::vector<int32_t> ends;
    int most = 0, end = 0;
    for (int i = 0; i < static_cast<int>(AT_ONCE); ++i) {
      const auto& x = flat[begin + (i < n ? i : 0)];
      values.insert({"x" + std::to_string(i), x});
      if (i >= n) continue;
      most = std::max(most, x.shape(0));
      ends.push_back(end += x.shape(0));
    }
    values.insert({"ends", device_ints(ends)});
    joined.push_back(launch("join", values, {{end}}, {mx::float32}, {},
                            {{tiles(most, THREADS * OF_A_THREAD), n, 1}, THREADS}, s)[0]);
  }
  return joined.size() == 1 ? joined[0] : mx::concatenate(joined, 0, s);
}

const Binding join_binding([](nb::module_& m) {
  m.def("join", &join, "arrays"_a, nb::kw_only(), "stream"_a = nb::none(),
        "Concatenates the elements of all arrays into one float32 vector.");
});

}  // namespace segtrain
