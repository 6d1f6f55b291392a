// Looks up rows of a frozen table, dense or quantized, and computes Gemma 4's per-layer inputs from such
// rows. On CUDA, each of the two is a single kernel (cuda/dequantize.cu); elsewhere, each is a sequence of
// MLX's ops.
#include "core/binding.h"
#include "core/gpu.h"
#include "ops/linear/base.h"

namespace segtrain {

namespace {

constexpr int EMBEDDING_THREADS = 256;

/// Columns [begin, end) of the rows of `table` whose indices are in `index`.
struct Rows {
  Base table;
  mx::array index;
  int begin, end;
  mx::StreamOrDevice s;

  int columns() const { return end - begin; }
  int count() const { return static_cast<int>(index.size()); }
  mx::Dtype dtype() const {
    if (!table.scales) return table.weight.dtype();
    return table.mode == "affine" ? table.scales->dtype() : mx::bfloat16;
  }
  mx::Shape shape() const {
    auto shape = index.shape();
    shape.push_back(columns());
    return shape;
  }
};

std::string unfit(const Rows& c) {
  if (!on_cuda(c.s)) return "this kernel exists only on CUDA";
  if (!c.count() || !c.columns()) return "table or index is empty";
  if (c.begin % 8 || c.end % 8) return "the columns must begin and end at multiples of 8";
  return unpack_unfit({c.table}, c.dtype());
}

/// Rounds a factor to `dtype`, as MLX's ops do before they multiply by it.
float rounded(float x, mx::Dtype dtype) {
  if (dtype == mx::bfloat16) return static_cast<float>(mx::bfloat16_t(x));
  return dtype == mx::float16 ? static_cast<float>(mx::float16_t(x)) : x;
}

mx::array run(const Rows& c, const char* kernel, std::map<std::string, mx::array> values,
              const std::vector<float>& factors, const Grid& grid) {
  auto table = unpack_table(c.table, c.dtype());
  values.insert(table.values.begin(), table.values.end());
  std::vector<float> args;
  for (float factor : factors) args.push_back(rounded(factor, c.dtype()));
  values.insert({{"index", mx::astype(mx::flatten(c.index, c.s), mx::int32, c.s)},
                 {"at", device_ints({c.count(), c.table.in(), c.begin, c.columns()})},
                 {"args", device_floats(args)}});
  return launch(kernel, values, {c.shape()}, {c.dtype()}, table.arguments, grid, c.s)[0];
}

mx::array stock(const Rows& c, float factor) {
  const int width = c.table.in(), parts = c.columns() ? width / c.columns() : 1;
  // If rows can be cut into equal parts of whole quantization groups, these parts are treated as the rows of
  // a longer table.
  const bool alike = parts * c.columns() == width && c.begin % c.columns() == 0 &&
                     (!c.table.scales || c.table.scales->shape(1) % parts == 0);
  auto at = mx::astype(c.index, mx::int32, c.s);  // the new indices may overflow a narrower type
  if (alike && parts > 1)
    at = mx::add(mx::multiply(at, mx::array(parts), c.s), mx::array(c.begin / c.columns()), c.s);
  auto take = [&](const mx::array& x) {
    const int n = alike ? parts : 1;
    return take_rows(mx::reshape(x, {x.shape(0) * n, x.shape(1) / n}, c.s), at, "auto", c.s);
  };
  auto y = take(c.table.weight);
  if (c.table.scales)
    y = mx::dequantize(y, take(*c.table.scales),
                       c.table.biases ? std::optional(take(*c.table.biases)) : std::nullopt,
                       c.table.group_size, c.table.bits, c.table.mode, std::nullopt, std::nullopt, c.s);
  if (!alike) {
    mx::Shape first(y.ndim(), 0), last = y.shape();
    first.back() = c.begin, last.back() = c.end;
    y = mx::slice(y, first, last, c.s);
  }
  return factor == 1 ? y : mx::multiply(y, mx::array(factor, y.dtype()), c.s);
}

Rows checked(const char* op, const Base& table, const mx::array& index, int begin, std::optional<int> end,
             mx::StreamOrDevice s) {
  check_base(op, table);
  const int last = end.value_or(table.in());
  check(mx::issubdtype(index.dtype(), mx::integer), "[", op, "] expected an integer index; got ",
        index.dtype(), ".");
  check(0 <= begin && begin < last && last <= table.in(), "[", op, "] expected columns within 0 to ",
        table.in(), "; got ", begin, " to ", last, ".");
  return {table, index, begin, last, s};
}

}  // namespace

mx::array embedded_rows(const Base& table, const mx::array& index, int begin, std::optional<int> end,
                        float factor, const std::string& impl, mx::StreamOrDevice s) {
  const auto c = checked("embedded_rows", table, index, begin, end, s);
  const Way kernel = gpu_kernel("embedded_rows", unfit(c));
  if (choose("embedded_rows", impl, {kernel, {"stock", true, ""}}) == "stock") return stock(c, factor);
  const Grid grid{{tiles(c.count() * (c.columns() / 8), EMBEDDING_THREADS), 1, 1}, EMBEDDING_THREADS};
  return run(c, "embedded_rows", {}, {factor}, grid);
}

mx::array own_input(const mx::array& x, const mx::array& weight, float eps, const Base& table,
                    const mx::array& index, int begin, const std::vector<float>& factors,
                    const std::string& impl, mx::StreamOrDevice s) {
  check(x.ndim() >= 1 && weight.ndim() == 1 && weight.shape(0) == x.shape(-1),
        "[own_input] expected x [..., D] and weight [D]; got ", x.shape(), " and ", weight.shape(), ".");
  check(factors.size() == 3, "[own_input] expected three factors; got ", factors.size(), ".");
  const auto c = checked("own_input", table, index, begin, begin + x.shape(-1), s);
  check(x.shape() == c.shape(), "[own_input] expected x ", c.shape(), "; got ", x.shape(), ".");
  auto reason = unfit(c);
  if (x.dtype() != c.dtype() || weight.dtype() != c.dtype())
    reason = "x, weight and table must have the same dtype";
  if (c.columns() > 8 * EMBEDDING_THREADS)
    reason = "x has more columns than " + std::to_string(8 * EMBEDDING_THREADS);
  if (choose("own_input", impl, {gpu_kernel("own_input", reason), {"stock", true, ""}}) == "stock") {
    auto times = [&](const mx::array& y, float factor) {
      return mx::multiply(y, mx::array(factor, y.dtype()), s);
    };
    auto normed = rms_norm(times(x, factors[0]), weight, eps, "auto", s);
    return times(mx::add(normed, stock(c, factors[1]), s), factors[2]);
  }
  std::map<std::string, mx::array> values{{"x", x}, {"weight", weight}, {"eps", device_floats({eps})}};
  return run(c, "own_input", values, factors, {{c.count(), 1, 1}, tiles(c.columns(), 8 * 32) * 32});
}

const Binding embedding_binding([](nb::module_& m) {
  m.def("embedded_rows", &embedded_rows, "table"_a, "index"_a, nb::kw_only(), "begin"_a = 0,
        "end"_a = nb::none(), "factor"_a = 1.0f, "impl"_a = "auto", "stream"_a = nb::none(),
        "Returns columns [begin, end) of the rows at `index`, times `factor`. index [...] → [..., end − "
        "begin].");
  m.def("own_input", &own_input, "x"_a, "weight"_a, "eps"_a, "table"_a, "index"_a, "begin"_a, "factors"_a,
        nb::kw_only(), "impl"_a = "auto", "stream"_a = nb::none(),
        "(rms_norm(x·f0) + rows·f1)·f2, where `rows` are D columns of the table's rows at `index`, starting "
        "at column `begin`. x [..., D] → [..., D].");
});

}  // namespace segtrain
