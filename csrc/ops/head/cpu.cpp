#include "ops/head/cpu.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "cpu/blas.h"
#include "cpu/rows.h"
#include "cpu/threads.h"

namespace segtrain::cpu {

namespace {

constexpr int TILE_ROWS = 256;               // rows of the head's weight that are dequantized at a time
constexpr size_t LOGITS = size_t{16} << 20;  // floats in one chunk of logits (64 MB)

/// Returns the number of rows whose logits are in memory at the same time.
int chunk_of(int rows, int vocabulary) {
  return std::min(rows, static_cast<int>(std::clamp<size_t>(LOGITS / vocabulary, 16, 256)));
}

/// Called with the index of a row, its logits z [V] after the softcap, and its target.
using RowJob = std::function<void(int i, float* z, int target)>;

/// Calls `job` with the logits of the rows `live` (in ascending order), in chunks. If `dh` [m, hidden] is
/// given, `job` must replace z with dz; then dh is set to dz·W, or to 0 for rows that are not live.
void for_each_row(const Weight& head, const HeadInput& in, const std::vector<int>& live, float* dh,
                  const RowJob& job) {
  const int v = head.n, hidden = head.k, n_live = static_cast<int>(live.size());
  const int chunk = chunk_of(n_live, v);
  const int blocks = (v + TILE_ROWS - 1) / TILE_ROWS;
  const size_t row = hidden;
  Scratch logits(static_cast<size_t>(chunk) * v);
  Scratch gathered(n_live < in.m ? chunk * row : 0);
  if (dh && n_live < in.m) std::fill(dh, dh + in.m * row, 0.0f);

  for (int m0 = 0; m0 < n_live; m0 += chunk) {
    const int m = std::min(chunk, n_live - m0);
    const int* at = live.data() + m0;
    // If the rows of the chunk are contiguous, they are not copied.
    const bool run = at[m - 1] - at[0] == m - 1;
    const float* h = run ? in.h + at[0] * row : gathered;
    if (!run)
      for (int i = 0; i < m; ++i) std::copy_n(in.h + at[i] * row, row, gathered + i * row);

    // z = h · Wᵀ + bias, softcapped
    parallel_for(blocks, [&](int block) {
      int n0 = block * TILE_ROWS, n1 = std::min(v, n0 + TILE_ROWS);
      linear_tile(head, n0, n1, m, h, in.bias, 0, nullptr, nullptr, logits);
      if (in.cap > 0)
        for (int i = 0; i < m; ++i) rows().softcap(logits + static_cast<size_t>(i) * v + n0, n1 - n0, in.cap);
    });

    parallel_for(m, [&](int i) { job(at[i], logits + static_cast<size_t>(i) * v, in.targets[at[i]]); });

    // dh = dz · W
    if (!dh) continue;
    linear_dx(head, m, logits, 0, nullptr, nullptr, run ? dh + at[0] * row : gathered);
    if (!run)
      for (int i = 0; i < m; ++i) std::copy_n(gathered + i * row, row, dh + at[i] * row);
  }
}

/// Returns the rows that have a target and for which `counts` returns true.
template <class Counts>
std::vector<int> live_rows(const HeadInput& in, Counts counts) {
  std::vector<int> live;
  for (int i = 0; i < in.m; ++i)
    if (in.targets[i] >= 0 && counts(i)) live.push_back(i);
  return live;
}

}  // namespace

size_t head_scratch(int m, int vocabulary, int hidden) {
  const size_t tiles = std::min(n_threads(), (vocabulary + TILE_ROWS - 1) / TILE_ROWS);
  return sizeof(float) * chunk_of(m, vocabulary) * vocabulary +
         std::max(sizeof(float) * tiles * TILE_ROWS * hidden, linear_dx_scratch(vocabulary, hidden));
}

void cross_entropy(const Weight& head, const CrossEntropy& args) {
  const int v = head.n;
  const auto live = live_rows(args.in, [&](int i) { return args.weights[i] != 0; });
  std::vector<double> row_loss(args.in.m, 0.0);
  // loss = Σ w·(lse − (1 − ε)·z[target] − ε·mean(z));  dz = w·(softmax(z) − (1 − ε)·onehot − ε / V)
  for_each_row(head, args.in, live, args.dh, [&](int i, float* z, int target) {
    float w = args.weights[i], shift = rows().max(z, v);
    float lse = shift + std::log(rows().sum_exp(z, v, shift));
    double likely = target < v ? z[target] : NAN;
    if (args.smoothing > 0) likely += args.smoothing * (rows().sum(z, v) / v - likely);
    row_loss[i] = w * (lse - likely);
    if (args.dh)
      rows().cross_entropy_vjp(z, v, lse, target < v ? w : NAN, target, args.smoothing, args.in.cap);
  });
  double loss = 0;
  for (double x : row_loss) loss += x;
  *args.loss = static_cast<float>(loss);
}

void log_probs(const Weight& head, const HeadInput& in, float* log_p, float* lse) {
  const int v = head.n;
  std::fill(log_p, log_p + in.m, 0.0f);
  std::fill(lse, lse + in.m, 0.0f);
  for_each_row(head, in, live_rows(in, [](int) { return true; }), nullptr, [&](int i, float* z, int target) {
    float shift = rows().max(z, v), log_sum = std::log(rows().sum_exp(z, v, shift));
    lse[i] = shift + log_sum;
    log_p[i] = target < v ? (z[target] - shift) - log_sum : NAN;
  });
}

void log_probs_vjp(const Weight& head, const HeadInput& in, const float* lse, const float* dlog_p,
                   float* dh) {
  const int v = head.n;
  const auto live = live_rows(in, [&](int i) { return dlog_p[i] != 0; });
  for_each_row(head, in, live, dh, [&](int i, float* z, int target) {
    rows().cross_entropy_vjp(z, v, lse[i], target < v ? -dlog_p[i] : NAN, target, 0, in.cap);
  });
}

}  // namespace segtrain::cpu
