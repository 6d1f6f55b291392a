// Gathers rows of a table by index. On CUDA we use cuda/rows.cu, because MLX would compile a kernel for each
// pair of dtypes at first use, and each compilation would take six seconds. On other devices we use MLX's op.
#include "core/binding.h"
#include "core/gpu.h"

namespace segtrain {

namespace {

constexpr int ROWS_THREADS = 256;

/// Launches take_rows (x [n, W], index [m] → [m, W]) or put_rows, its gradient (dy [m, W], index [m] → dx [n,
/// W]).
mx::array cuda_rows(const char* kernel, const mx::array& x, const mx::array& index, int blocks,
                    mx::StreamOrDevice s) {
  const int W = x.shape(1);
  const std::map<std::string, mx::array> values{
      {"x", x}, {"index", mx::astype(index, mx::int32, s)}, {"at", device_ints({index.shape(0), W})}};
  return launch(kernel, values, {{blocks, W}}, {x.dtype()}, {{"T", x.dtype()}},
                {{blocks, 1, 1}, ROWS_THREADS}, s)[0];
}

std::string unfit(const mx::array& x, const mx::array& index) {
  if (x.size() == 0 || index.size() == 0) return "x or index is empty";
  return x.dtype() == mx::float64 ? "it does not support float64" : "";
}

}  // namespace

mx::array take_rows(const mx::array& x, const mx::array& index, const std::string& impl,
                    mx::StreamOrDevice s) {
  check(x.ndim() > 0, "[take_rows] expected x [N, ...]; got ", x.shape(), ".");
  const bool cuda = on_cuda(s);
  const Way kernel = cuda ? gpu_kernel("take_rows", unfit(x, index))
                          : Way{"kernel", false, "this kernel exists only on CUDA"};
  if (choose("take_rows", impl, {kernel, {"stock", true, ""}}) == "stock") return mx::take(x, index, 0, s);
  const int n = x.shape(0);
  mx::Shape shape = index.shape();
  shape.insert(shape.end(), x.shape().begin() + 1, x.shape().end());
  auto flat = mx::flatten(index, s);
  auto op = mx::custom_vjp(
      [=](const Arrays& in) -> Arrays { return {cuda_rows("take_rows", in[0], flat, flat.shape(0), s)}; },
      [=](const Arrays&, const Arrays& dy, const Arrays&) -> Arrays {
        return {cuda_rows("put_rows", dy[0], flat, n, s)};
      });
  return mx::reshape(op({mx::reshape(x, {n, static_cast<int>(x.size() / n)}, s)})[0], shape, s);
}

const Binding rows_binding([](nb::module_& m) {
  m.def("take_rows", &take_rows, "x"_a, "index"_a, nb::kw_only(), "impl"_a = "auto", "stream"_a = nb::none(),
        "x[index]. x [N, ...], index [...] int32 → [..., ...].");
});

}  // namespace segtrain
