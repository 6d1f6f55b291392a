#include "ops/attention/parts.h"

#include <algorithm>
#include <atomic>

#include "core/binding.h"
#include "mlx/backend/gpu/device_info.h"
#include "mlx/backend/metal/metal.h"

namespace segtrain {

namespace {

/// Multiply-adds a second of our kernels on an M1, which has 8 cores: a prediction, docs/performance.md.
constexpr double M1_RATE = 5e11;
std::atomic<double> longest{0.3};  ///< seconds of a launch

double seconds(const Call& c, int products, double pairs) {
  return pairs * products * c.D * c.H * c.B / M1_RATE;
}

/// Neighbouring groups of METAL_ROWS of n rows, as many together as fit; `pairs(begin, end)` of a group: how
/// many scores it makes for one head.
template <class Pairs>
Ranges grouped(const Call& c, int products, int n, const Pairs& pairs) {
  Ranges parts;
  double sum = 0;
  for (int begin = 0; begin < n; begin += METAL_ROWS) {
    const int end = std::min(begin + METAL_ROWS, n);
    const double own = seconds(c, products, pairs(begin, end));
    if (parts.empty() || sum + own > longest) {
      parts.push_back({begin, end});
      sum = own;
    } else {
      parts.back().second = end;
      sum += own;
    }
  }
  return parts;
}

/// Keys from the first that a query of the group sees to the last, for each of the group's rows.
double pairs_of_queries(const Call& c, int begin, int end) {
  return static_cast<double>(METAL_ROWS) * std::max(0, c.q_start + end - c.first[begin]);
}

/// Queries from the first that is not before the group's keys to the last that sees one, for each of its
/// rows.
double pairs_of_keys(const Call& c, int begin, int end) {
  const auto after = std::lower_bound(c.first.begin(), c.first.end(), end) - c.first.begin();
  const auto from = std::max(0, begin - c.q_start);
  return static_cast<double>(METAL_ROWS) * std::max<double>(0, static_cast<double>(after - from));
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
    // The last letter of "applegpu_g13s": s is a Max, d an Ultra; the others may be as small as an M1.
    const char kind = std::get<std::string>(found->second).back();
    return kind == 's' ? 3.0 : kind == 'd' ? 6.0 : 1.0;
  }();
  return many;
}

Ranges query_parts(const Call& c, int products) {
  return grouped(c, products, c.T, [&](int begin, int end) { return pairs_of_queries(c, begin, end); });
}

Ranges key_parts(const Call& c, int products) {
  return grouped(c, products, c.S, [&](int begin, int end) { return pairs_of_keys(c, begin, end); });
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

const Binding binding([](nb::module_& m) {
  m.def(
      "set_longest_launch", [](double seconds) { return longest.exchange(seconds); }, "seconds"_a,
      "What a launch of attention on Metal may take on an M1, as predicted; what was set before. For tests.");
});

}  // namespace segtrain
