#include "ops/attention/parts.h"

#include <algorithm>
#include <atomic>

#include "core/binding.h"
#include "mlx/backend/gpu/device_info.h"
#include "mlx/backend/metal/metal.h"

namespace segtrain {

namespace {

/// Multiply-adds per second of our kernels on an M1 with 8 GPU cores, as predicted in docs/performance.md.
constexpr double M1_RATE = 5e11;
std::atomic<double> longest{0.3};  ///< maximum predicted seconds of a launch

double seconds(const Call& c, int products, double pairs) {
  return pairs * products * c.D * c.H * c.B / M1_RATE;
}

/// Divides the queries into groups of `unit` queries, and combines consecutive groups into ranges. A range
/// has as many groups as the time limit and `bytes` allow. For each group, all scores in its rectangle of
/// queries × keys are counted, with `each` bytes of memory per score.
Ranges grouped(const Call& c, int unit, int products, int64_t bytes, int64_t each) {
  Ranges parts;
  double sum = 0;
  for (int begin = 0; begin < c.T; begin += unit) {
    const int end = std::min(begin + unit, c.T);
    // The group's rectangle: for each row, all keys from the first to the last one that any query of the
    // group sees.
    const double pairs = static_cast<double>(unit) * std::max(0, c.q_start + end - c.first[begin]);
    const double own = std::max(seconds(c, products, pairs) / longest,
                                pairs * c.H * c.B * static_cast<double>(each) / static_cast<double>(bytes));
    if (parts.empty() || !(sum + own <= 1)) {  // `longest` may be 0
      parts.push_back({begin, end});
      sum = own;
    } else {
      parts.back().second = end;
      sum += own;
    }
  }
  return parts;
}

}  // namespace

double causal_seconds(const Call& c, int products) {
  return seconds(c, products, static_cast<double>(c.T) * c.T / 2);
}

double m1s_of_gpu() {
  static const double many = [] {
    if (!mx::metal::is_available()) return 1.0;
    const auto& info = mx::gpu::device_info(0);
    auto found = info.find("architecture");
    if (found == info.end()) return 1.0;
    // The last letter of a name such as "applegpu_g13s" is s for a Max and d for an Ultra. Any other GPU is
    // assumed to be as slow as an M1.
    const char kind = std::get<std::string>(found->second).back();
    return kind == 's' ? 3.0 : kind == 'd' ? 6.0 : 1.0;
  }();
  return many;
}

Ranges forward_parts(const Call& c) {
  return grouped(c, metal_forward_rows(c.D), FORWARD_PRODUCTS, SCORE_BYTES, 0);
}

Ranges vjp_parts(const Call& c) {
  return grouped(c, metal_vjp_rows(c.D), DKV_PRODUCTS, SCORE_BYTES,
                 static_cast<int64_t>(mx::size_of(metal_score_dtype(c.dtype))));
}

mx::Dtype metal_score_dtype(mx::Dtype dtype) {
  return dtype == mx::float16 ? mx::float32 : dtype;
}

ScoreBlocks score_blocks(const Call& c) {
  ScoreBlocks blocks;
  for (int key = 0; key < c.S; key += METAL_ROWS) {
    // A block is not empty if the range of its first query begins at or before the block's last key.
    const int from = std::max(0, key - c.q_start) / METAL_ROWS, end = std::min(key + METAL_ROWS, c.S);
    int to = from;
    while (to * METAL_ROWS < c.T && c.first[to * METAL_ROWS] < end) ++to;
    blocks.index.push_back(blocks.count - from);
    blocks.count += to - from;
  }
  blocks.index.resize(std::max<size_t>(blocks.index.size(), 8));
  return blocks;
}

int64_t metal_vjp_scratch(const Call& c) {
  const int64_t keys = std::min<int64_t>(c.S, (c.window ? c.window : c.S) + metal_vjp_rows(c.D));
  const auto bytes = static_cast<int64_t>(mx::size_of(metal_score_dtype(c.dtype)));
  return std::min(SCORE_BYTES, bytes * c.B * c.H * c.T * keys);
}

std::pair<int, int> keys_of_queries(const Call& c, std::pair<int, int> queries) {
  const int first = std::min(c.first[queries.first], c.q_start + queries.first);
  return {first / METAL_ROWS * METAL_ROWS, c.q_start + queries.second};
}

Call of_queries(const Call& c, std::pair<int, int> part) {
  Call own = c;
  own.T = part.second - part.first;
  own.q_start += part.first;
  own.first.assign(c.first.begin() + part.first, c.first.begin() + part.second);
  return own;
}

Call of_keys(const Call& c, std::pair<int, int> part) {
  Call own = c;
  own.S = part.second - part.first;
  own.q_start -= part.first;
  for (auto& key : own.first) key -= part.first;
  return own;
}

Call of_groups(const Call& c, int groups) {
  Call own = c;
  own.H = groups * c.share();
  own.G = groups;
  return own;
}

const Binding parts_binding([](nb::module_& m) {
  m.def(
      "set_longest_launch", [](double seconds) { return longest.exchange(seconds); }, "seconds"_a,
      "Sets the maximum predicted time, in seconds on an M1, of an attention launch on Metal, and returns "
      "the previous value. For tests.");
});

}  // namespace segtrain
