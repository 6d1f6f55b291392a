#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/blas.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "cpu/threads.h"

namespace segtrain::cpu {

namespace {
constexpr int TILE_ROWS = 256;               // of the head, unpacked at a time
constexpr size_t LOGITS = size_t{16} << 20;  // floats of one chunk of logits: 64 MB
}  // namespace

void cross_entropy(const Weight& head, const CrossEntropy& args) {
  const int v = head.n, hidden = head.k;
  const int chunk = static_cast<int>(std::clamp<size_t>(LOGITS / v, 16, 256));
  const int blocks = (v + TILE_ROWS - 1) / TILE_ROWS;
  Scratch logits(static_cast<size_t>(std::min(chunk, args.m)) * v);
  double loss = 0;

  for (int m0 = 0; m0 < args.m; m0 += chunk) {
    const int m = std::min(chunk, args.m - m0);
    const float* h = args.h + static_cast<size_t>(m0) * hidden;

    // z = h · Wᵀ, capped.
    parallel_for(blocks, [&](int block) {
      int n0 = block * TILE_ROWS, n1 = std::min(v, n0 + TILE_ROWS);
      Scratch scratch(head.dense ? 0 : static_cast<size_t>(n1 - n0) * hidden);
      auto [data, ld] = tile(head, n0, n1, 0, hidden, scratch);
      gemm(false, true, m, n1 - n0, hidden, 1, h, hidden, data, ld, 0, logits + n0, v);
      if (args.cap > 0)
        for (int i = 0; i < m; ++i)
          rows().softcap(logits + static_cast<size_t>(i) * v + n0, n1 - n0, args.cap);
    });

    // loss = Σ w·(lse − z[target]);  dz = w·(softmax(z) − onehot), in the place of z.
    std::vector<double> row_loss(m, 0.0);
    parallel_for(m, [&](int i) {
      float* z = logits + static_cast<size_t>(i) * v;
      int target = args.targets[m0 + i];
      float w = target < 0 ? 0 : args.weights[m0 + i];
      if (w == 0) {
        if (args.dh) std::fill(z, z + v, 0.0f);
        return;
      }
      float shift = rows().max(z, v);
      float lse = shift + std::log(rows().sum_exp(z, v, shift));
      row_loss[i] = static_cast<double>(w) * (lse - z[target]);
      if (!args.dh) return;
      if (args.cap > 0) {
        rows().softcap_cross_entropy(z, v, lse, w, target, args.cap);
      } else {
        rows().exp_scale(z, v, lse, w);
        z[target] -= w;
      }
    });
    for (double x : row_loss) loss += x;

    // dh = dz · W
    if (args.dh) {
      linear_dx(head, m, logits, 0, nullptr, nullptr, args.dh + static_cast<size_t>(m0) * hidden);
    }
  }
  *args.loss = static_cast<float>(loss);
}

}  // namespace segtrain::cpu
