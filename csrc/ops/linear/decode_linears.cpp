// Linear layers in a decoding step, whose speed is limited by how fast the host launches kernels. For each
// layer, MLX's ops need one launch for the matrix product and two more for the low-rank update. On CUDA, one
// launch computes all linear layers that read the same x (cuda/decode.cu); elsewhere we use MLX's ops.
#include <mutex>

#include "core/binding.h"
#include "core/gpu.h"
#include "ops/linear/base.h"

namespace segtrain {

namespace {

constexpr int WARPS = 8, OUT = 2, PIECE = 16, MOST_RANK = 64;  // the same as in cuda/decode.cu
constexpr size_t MOST_PARTS = 3;
constexpr int BLOCKS = 1024;  ///< maximum blocks per layer, so that a block of a wide layer reuses its z
constexpr int MOST_ROWS = 16;
/// With at least this many outputs, a block computes two tiles, which share x.
constexpr int MANY_OUTS = 16384;

/// Returns whether this number of rows is computed on tensor cores. They are used for all batches of two or
/// more rows, so that a row's result does not depend on the size of such a batch.
bool by_tensor_cores(mx::Dtype dtype, int rows) {
  return rows > 1 && dtype != mx::float32 && compute_capability() >= 80;
}

/// Returns the smallest number of rows, at least `rows`, for which a kernel is compiled.
int kernel_rows(mx::Dtype dtype, int rows) {
  if (rows == 1) return 1;
  const int fewer = by_tensor_cores(dtype, rows) ? 8 : 4;
  return rows <= fewer ? fewer : MOST_ROWS;
}

/// Returns a placeholder for an input that a call does not have.
mx::array absent(mx::Dtype dtype) {
  static std::mutex lock;
  static auto& known = *new std::map<int, mx::array>;  // never destroyed: outlives MLX's statics
  std::lock_guard guard(lock);
  const int key = static_cast<int>(dtype.val());
  if (auto found = known.find(key); found != known.end()) return found->second;
  auto zero = mx::zeros({1}, dtype);
  zero.eval();  // because other threads and streams may use the array
  return known.emplace(key, zero).first->second;
}

int rank_of(const std::optional<mx::array>& b) {
  return b ? b->shape(2) : 0;
}

}  // namespace

struct DecodeLinears::Calls {
  PreparedLaunch linears;
  std::optional<PreparedLaunch> factors;
  bool picks;  ///< whether the kernel `linears` reads the adapter of each row
};

DecodeLinears::DecodeLinears(std::vector<Base> bases, std::optional<mx::array> a,
                             std::vector<std::optional<mx::array>> b,
                             std::vector<std::optional<mx::array>> gains)
    : bases_(std::move(bases)), a_(std::move(a)), b_(std::move(b)), gains_(std::move(gains)) {
  const std::string op = "DecodeLinears";
  check(!bases_.empty(), "[", op, "] expected at least one base.");
  b_.resize(bases_.size());
  gains_.resize(bases_.size());
  int ranks = 0;
  for (size_t j = 0; j < bases_.size(); ++j) {
    const auto& base = bases_[j];
    check_base(op, base);
    check(base.in() == bases_[0].in(), "[", op, "] all weights must read the same x; got widths ",
          bases_[0].in(), " and ", base.in(), ".");
    const auto& own = b_[j];
    check(!own || (a_ && own->ndim() == 3 && own->shape(0) == a_->shape(0) && own->shape(1) == base.out()),
          "[", op, "] expected b [E, ", base.out(), ", R_j] together with a [E, R, in].");
    const auto& gain = gains_[j];
    check(!gain || (gain->ndim() == 2 && gain->shape(1) == base.out() && gain->dtype() == mx::float32), "[",
          op, "] expected gains [E, ", base.out(), "] of float32.");
    ranks += rank_of(own);
  }
  check(!a_ || (a_->ndim() == 3 && a_->shape(1) == ranks && a_->shape(2) == bases_[0].in()), "[", op,
        "] expected a [E, ", ranks, ", ", bases_[0].in(), "]; got ", a_ ? a_->shape() : mx::Shape{}, ".");
}

std::string DecodeLinears::unfit(mx::Dtype dtype, int rows) const {
  if (gpu() != Gpu::cuda) return "it needs CUDA";
  if (dtype != mx::float32 && dtype != mx::float16 && dtype != mx::bfloat16)
    return "it supports float32, float16 and bfloat16";
  if (rows < 1 || rows > MOST_ROWS) return "it supports 1 to " + std::to_string(MOST_ROWS) + " rows";
  if (bases_.size() > MOST_PARTS) return "it supports up to three linear layers";
  const auto& first = bases_[0];
  if (first.in() % PIECE) return "the input width is not a multiple of 16";
  for (const auto& base : bases_) {
    if (base.scales.has_value() != first.scales.has_value() || base.bits != first.bits ||
        base.group_size != first.group_size)
      return "the weights must all be dense, or all have the same quantization";
    if (base.scales && (base.mode != "affine" || (base.bits != 4 && base.bits != 8 && base.bits != 2)))
      return "a quantized weight must be affine with 2, 4 or 8 bits";
    if (base.scales && (base.scales->dtype() != first.scales->dtype() ||
                        base.biases->dtype() != first.scales->dtype() || base.scales->dtype() == mx::float64))
      return "scales and biases must have the same dtype";
    if (!base.scales && base.weight.dtype() != dtype) return "a dense weight must have x's dtype";
    if (base.out() % 8) return "an output width is not a multiple of 8";
    if (base.bias && base.bias->dtype() != dtype) return "the bias must have x's dtype";
  }
  if (a_ && a_->dtype() != dtype) return "factors must have x's dtype";
  for (const auto& own : b_)
    if (own && own->dtype() != dtype) return "factors must have x's dtype";
  return "";
}

std::shared_ptr<const DecodeLinears::Calls> DecodeLinears::calls(mx::Dtype dtype, int rows) {
  const std::pair key(static_cast<int>(dtype.val()), rows);
  if (auto found = calls_.find(key); found != calls_.end()) return found->second;
  const auto& first = bases_[0];
  const bool dense = !first.scales;
  const auto none = absent(dtype), zero = absent(mx::float32), picks = absent(mx::uint32);
  int outs = 0;
  for (const auto& base : bases_) outs += base.out();
  const int out_tiles = !by_tensor_cores(dtype, rows) ? 0
                        : dense || outs < MANY_OUTS   ? 1
                                                      : 2;  // 16 outputs each
  bool high = rows > 1;
  int ranks = 0, blocks = 0;
  for (const auto& b : b_) ranks += rank_of(b), high = high || rank_of(b) > MOST_RANK;
  const bool low = high && ranks > 0;  // x·aᵀ is computed by a separate launch
  std::vector<int32_t> at{first.in(), ranks, low};
  std::map<std::string, mx::array> values{
      {"a", a_.value_or(none)}, {"z", zero}, {"picks", picks}, {"rows", device_ints({rows})}};
  int begin = 0;
  for (size_t j = 0; j < MOST_PARTS; ++j) {
    const bool there = j < bases_.size();
    const auto& base = bases_[there ? j : 0];
    const auto b = there ? b_[j] : std::nullopt, gain = there ? gains_[j] : std::nullopt;
    const int needed = !there      ? 0
                       : out_tiles ? tiles(base.out(), 16 * out_tiles)
                                   : std::min(tiles(base.out(), WARPS * OUT), BLOCKS);
    const auto number = std::to_string(j);
    const auto scales = base.scales.value_or(base.weight);
    values.insert({{"w" + number, base.weight},
                   {"scales" + number, scales},
                   {"biases" + number, base.biases.value_or(scales)},
                   {"b" + number, b.value_or(none)},
                   {"gain" + number, gain.value_or(zero)},
                   {"bias" + number, base.bias.value_or(none)}});
    at.insert(at.end(), {needed, base.out(), rank_of(b), begin, base.bias.has_value(), gain.has_value()});
    begin += rank_of(b);
    blocks += needed;
  }
  values.insert({"at", device_ints(at)});
  const Template kind{{"BITS", dense ? 0 : first.bits},
                      {"GROUP", dense ? 32 : first.group_size},
                      {"ROWS", kernel_rows(dtype, rows)},
                      {"TILES", out_tiles}};
  const Grid grid{{blocks, 1, 1}, WARPS * 32, 0, out_tiles ? 2 : 1};
  std::vector<std::string> open{"x"};
  Arrays like{none};
  const bool picked = a_ || std::ranges::any_of(gains_, [](const auto& gain) { return gain.has_value(); });
  if (picked) open.push_back("picks"), like.push_back(picks);
  std::optional<PreparedLaunch> factors;
  if (low) {
    factors = PreparedLaunch("decode_factors", values, open, like, mx::float32, {},
                             {{tiles(rows * ranks, WARPS), 1, 1}, WARPS * 32});
    open.push_back("z"), like.push_back(zero);
  }
  auto own = std::make_shared<Calls>(
      Calls{PreparedLaunch("decode_linears", values, open, like, dtype, kind, grid), factors, picked});
  if (!collects_kernels()) calls_[key] = own;  // otherwise its kernels are not compiled yet
  return own;
}

Arrays DecodeLinears::plain(const mx::array& x, const mx::array& picks, mx::StreamOrDevice s) const {
  const int m = static_cast<int>(x.size()) / x.shape(-1);
  const auto rows = mx::reshape(x, {m, x.shape(-1)}, s), row = mx::expand_dims(rows, 1, s);
  Arrays ys;
  int begin = 0;
  for (size_t j = 0; j < bases_.size(); ++j) {
    const auto& base = bases_[j];
    auto y = stock_product(rows, base, true, s);
    if (b_[j]) {
      const int end = begin + rank_of(b_[j]);
      const auto a =
          mx::take(mx::slice(*a_, {0, begin, 0}, {a_->shape(0), end, x.shape(-1)}, s), picks, 0, s);
      const auto b = mx::take(*b_[j], picks, 0, s);
      const auto z = mx::matmul(row, mx::swapaxes(a, 1, 2, s), s);
      y = mx::add(y, mx::squeeze(mx::matmul(z, mx::swapaxes(b, 1, 2, s), s), 1, s), s);
      begin = end;
    }
    if (gains_[j]) y = mx::multiply(y, mx::take(*gains_[j], picks, 0, s), s);
    if (base.bias) y = mx::add(y, *base.bias, s);
    mx::Shape shape(x.shape().begin(), x.shape().end() - 1);
    shape.push_back(base.out());
    ys.push_back(mx::astype(mx::reshape(y, shape, s), x.dtype(), s));
  }
  return ys;
}

Arrays DecodeLinears::operator()(const mx::array& x, const mx::array& picks, const std::string& impl,
                                 mx::StreamOrDevice s) {
  const int k = bases_[0].in();
  check(x.ndim() > 0 && x.shape(-1) == k, "[DecodeLinears] expected x [..., ", k, "]; got ", x.shape(), ".");
  const int m = static_cast<int>(x.size()) / std::max(k, 1);
  check(picks.dtype() == mx::uint32 && static_cast<int>(picks.size()) == m,
        "[DecodeLinears] expected picks [", m, "] of uint32; got ", picks.shape(), " of ", picks.dtype(),
        ".");
  const Way way = on_cpu(s) && !dry_run() ? Way{"kernel", false, "it needs CUDA"}
                                          : gpu_kernel("decode_linears", unfit(x.dtype(), m));
  if (choose("DecodeLinears", impl, {way, {"stock", true, ""}}) == "stock") return plain(x, picks, s);
  const auto own = calls(x.dtype(), m);
  Arrays inputs{x};
  if (own->picks) inputs.push_back(picks);
  if (own->factors) inputs.push_back((*own->factors)(inputs, {{m, a_->shape(1)}}, s)[0]);
  std::vector<mx::Shape> shapes;
  for (const auto& base : bases_) {
    shapes.push_back(x.shape());
    shapes.back().back() = base.out();
  }
  return own->linears(inputs, std::move(shapes), s);
}

const Binding decode_linears_binding([](nb::module_& m) {
  nb::class_<DecodeLinears>(
      m, "DecodeLinears",
      "Linear layers that read the same few rows in a decoding step. Each layer has the low-rank updates of "
      "several adapters, and each row uses one of these adapters.")
      .def(nb::init<std::vector<Base>, std::optional<mx::array>, std::vector<std::optional<mx::array>>,
                    std::vector<std::optional<mx::array>>>(),
           "bases"_a, "a"_a = nb::none(), "b"_a = std::vector<std::optional<mx::array>>(),
           "gains"_a = std::vector<std::optional<mx::array>>(),
           "For E adapters, `a` is [E, R, in]. For each linear layer, `b` contains an array [E, out, R_j], "
           "where the ranks R_j add up to R, and `gains` contains an array [E, out] float32.")
      .def("__call__", &DecodeLinears::operator(), "x"_a, "picks"_a, nb::kw_only(), "impl"_a = "auto",
           "stream"_a = nb::none(),
           "x [..., in], picks [rows] uint32 → [..., out] for each linear layer. `picks` contains the "
           "adapter's index for each row.")
      .def(
          "unfit",
          [](const DecodeLinears& op, mx::Dtype dtype, int rows) {
            return gpu_kernel("decode_linears", op.unfit(dtype, rows)).reason;
          },
          "dtype"_a, "rows"_a,
          "Returns why no kernel supports this number of rows of this dtype, or an empty string if one "
          "does.");
});

}  // namespace segtrain
