// Rotary embeddings. On the CPU we use our own kernel, because MLX's rope is a sequence of small ops there.
// On GPUs we use MLX's rope, except for segments, which it does not support; for these we use
// metal/rope.metal or cuda/rope.cu.
#include "ops/rope/rope.h"

#include <climits>
#include <cmath>

#include "core/binding.h"
#include "core/gpu.h"
#include "cpu/rows.h"
#include "cpu/threads.h"
#include "mlx/fast.h"

namespace segtrain {

namespace {

/// Copies x to y and rotates the first `dims` dimensions of each row by the angles positions[t]·scale /
/// freqs[i]. If `sign` is −1, it rotates in the opposite direction.
void rotate_rows(const float* x, const float* freqs, float scale, float sign,
                 const std::vector<int32_t>& positions, bool traditional, int n_rows, int d, int dims,
                 float* y) {
  const int half = dims / 2;
  const size_t t = positions.size();
  std::vector<float> cosine(t * half), sine(cosine.size());
  cpu::over(t, cpu::WORTH_A_THREAD / half / 8, [&](size_t i, size_t end) {
    for (; i < end; ++i)
      for (int j = 0; j < half; ++j) {
        float angle = scale * static_cast<float>(positions[i]) / freqs[j];
        cosine[i * half + j] = std::cos(angle);
        sine[i * half + j] = sign * std::sin(angle);
      }
  });
  cpu::over(static_cast<size_t>(n_rows) * t, cpu::WORTH_A_THREAD / d, [&](size_t i, size_t end) {
    for (; i < end; ++i) {
      const float* x_i = x + i * d;
      float* y_i = y + i * d;
      size_t at = i % t * half;
      cpu::rows().rotate(x_i, &cosine[at], &sine[at], y_i, half, traditional);
      std::copy(x_i + dims, x_i + d, y_i + dims);
    }
  });
}

constexpr int ROPE_THREADS = 256;  ///< threads per group

/// The parameters of a rotation, except x and the divisors.
struct Rope {
  int dims;
  bool traditional;
  float scale;
  std::vector<int32_t> positions;  ///< [T]
  mx::StreamOrDevice s;
};

mx::array cpu_rotate(const Rope& c, const mx::array& x, const mx::array& divisors, bool back) {
  int T = x.shape(2), D = x.shape(3), rows = static_cast<int>(x.size() / std::max<size_t>(1, size_t(T) * D));
  return cpu_op(
      "rope", {x, divisors}, {x.shape()},
      [=](auto& in, auto& out) {
        rotate_rows(in[0], in[1], c.scale, back ? -1 : 1, c.positions, c.traditional, rows, D, c.dims,
                    out[0]);
      },
      c.s)[0];
}

/// Rotates on a GPU. The matrix products that compute the heads and read their gradient use the layout [B, T,
/// H, D], and attention uses [B, H, T, D]. The kernel reads one layout and writes the other, which avoids
/// copies.
mx::array gpu_rotate(const Rope& c, const mx::array& x, const mx::array& divisors, bool back) {
  const int B = x.shape(0), H = x.shape(1), T = x.shape(2), D = x.shape(3), items = D - c.dims / 2;
  // On Metal, MLX passes inputs with fewer than 8 elements in a different address space, so `positions` is
  // padded to at least 8 elements.
  auto positions = c.positions;
  positions.resize(std::max<size_t>(positions.size(), 8));
  auto by_token = [&](const mx::array& y) { return mx::transpose(y, {0, 2, 1, 3}, c.s); };
  std::map<std::string, mx::array> values{{"x", back ? x : by_token(x)},
                                          {"freqs", divisors},
                                          {"positions", device_ints(positions)},
                                          {"at", device_ints({B, H, T, D, c.dims})},
                                          {"args", device_floats({c.scale})}};
  mx::Shape shape = back ? mx::Shape{B, T, H, D} : x.shape();
  auto y = launch("rope", values, {shape}, {x.dtype()},
                  {{"T", x.dtype()}, {"TRADITIONAL", c.traditional}, {"BACK", back}},
                  {{tiles(B * H * T * items, ROPE_THREADS), 1, 1}, ROPE_THREADS}, c.s)[0];
  return back ? by_token(y) : y;
}

std::string gpu_unfit(const mx::array& x) {
  if (x.size() == 0) return "x is empty";
  // The number of threads, rounded up to whole groups, must fit in an int.
  return x.size() > INT_MAX - ROPE_THREADS ? "it supports x of up to 2³¹ − 257 elements" : "";
}

/// freqs[i] = base^(2i / dims)
mx::array divisors_of(float base, int dims, mx::StreamOrDevice s) {
  auto exponents =
      mx::divide(mx::arange(0.0, dims, 2.0, mx::float32, s), mx::array(static_cast<float>(dims)), s);
  return mx::power(mx::array(base), exponents, s);
}

}  // namespace

std::vector<int32_t> positions_of(int offset, int n, const Ranges& segments) {
  std::vector<int32_t> positions;
  auto segment = segments.begin();
  for (int t = offset; t < offset + n; ++t) {
    while (segment != segments.end() && segment->second <= t) ++segment;
    bool inside = segment != segments.end() && segment->first <= t;
    positions.push_back(inside ? t - segment->first : t);
  }
  return positions;
}

mx::array device_divisors(int dims, std::optional<float> base, const std::optional<mx::array>& freqs,
                          mx::StreamOrDevice s) {
  if (freqs) return f32(*freqs, s);
  std::vector<float> divisors;
  for (int i = 0; i < dims; i += 2)
    divisors.push_back(
        static_cast<float>(std::pow(static_cast<double>(*base), static_cast<double>(i) / dims)));
  return device_floats(divisors);
}

mx::array rope(const mx::array& x, int dims, bool traditional, std::optional<float> base, float scale,
               int offset, const std::optional<mx::array>& freqs, const std::optional<Ranges>& segments,
               const std::string& impl, mx::StreamOrDevice s) {
  check(x.ndim() == 4, "[rope] expected x [B,H,T,D]; got ", x.shape(), ".");
  check(dims > 0 && dims % 2 == 0 && dims <= x.shape(3),
        "[rope] dims must be even and at most D = ", x.shape(3), "; got ", dims, ".");
  check(base.has_value() != freqs.has_value(), "[rope] specify either base or freqs.");
  const bool cpu = on_cpu(s);
  const Way kernel = cpu || !segments ? cpu_kernel(s) : gpu_kernel("rope", gpu_unfit(x));
  const Way stock{"stock", !segments, "MLX's rope does not support segments"};
  if (choose("rope", impl, {kernel, stock}) == "stock")
    return mx::fast::rope(x, dims, traditional, base, scale, offset, freqs, s);
  const Rope c{dims, traditional, scale, positions_of(offset, x.shape(2), segments.value_or(Ranges{})), s};
  auto divisors = cpu && base ? divisors_of(*base, dims, s) : device_divisors(dims, base, freqs, s);
  auto rotate = [=, dtype = x.dtype()](const mx::array& y, bool back) {
    if (!cpu) return gpu_rotate(c, mx::astype(y, dtype, s), divisors, back);
    return mx::astype(cpu_rotate(c, y, divisors, back), dtype, s);
  };
  // The transpose of a rotation is its inverse.
  auto op = mx::custom_vjp(
      [=](const Arrays& in) -> Arrays { return {rotate(in[0], false)}; },
      [=](const Arrays&, const Arrays& dy, const Arrays&) -> Arrays { return {rotate(dy[0], true)}; });
  return op({x})[0];
}

const Binding rope_binding([](nb::module_& m) {
  m.def("rope", &rope, "x"_a, "dims"_a, nb::kw_only(), "traditional"_a = false, "base"_a = nb::none(),
        "scale"_a = 1.0f, "offset"_a = 0, "freqs"_a = nb::none(), "segments"_a = nb::none(),
        "impl"_a = "auto", "stream"_a = nb::none(), "Applies rotary embeddings. x [B,H,T,D] → [B,H,T,D].");
});

}  // namespace segtrain
