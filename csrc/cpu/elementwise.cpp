// Row-wise passes on all threads, and the choice of the loops that this processor runs.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "cpu/threads.h"

namespace segtrain::cpu {

extern const Rows rows_baseline;
#ifdef __x86_64__
extern const Rows rows_avx2, rows_avx512;
#endif

const Rows& rows() {
#ifdef __x86_64__
  static const Rows& best = [&]() -> const Rows& {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return rows_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return rows_avx2;
    return rows_baseline;
  }();
  return best;
#else
  return rows_baseline;
#endif
}

namespace {

/// run(begin, end) over [0, n), in runs long enough to be worth a thread.
template <class Run>
void over(size_t n, size_t least, const Run& run) {
  size_t runs = std::clamp<size_t>(n / std::max<size_t>(least, 1), 1, 4 * n_threads());
  size_t length = (n + runs - 1) / runs;
  parallel_for(static_cast<int>(runs), [&](int job) {
    size_t begin = std::min(n, job * length), end = std::min(n, begin + length);
    if (begin < end) run(begin, end);
  });
}

constexpr size_t LEAST = 1 << 14;  // floats

}  // namespace

void glu(bool gelu, const float* gate, const float* up, float* y, size_t n) {
  over(n, LEAST, [&](size_t i, size_t end) { rows().glu[gelu](gate + i, up + i, y + i, end - i); });
}

void glu_vjp(bool gelu, const float* gate, const float* up, const float* dy, float* dgate, float* dup,
             size_t n) {
  over(n, LEAST, [&](size_t i, size_t end) {
    rows().glu_vjp[gelu](gate + i, up + i, dy + i, dgate + i, dup + i, end - i);
  });
}

void rms_norm(const float* x, const float* weight, float eps, float* y, int m, int n) {
  over(m, LEAST / n, [&](size_t i, size_t end) {
    for (; i < end; ++i) rows().rms_norm(x + i * n, weight, eps, y + i * n, n);
  });
}

void rms_norm_vjp(const float* x, const float* weight, const float* dy, float eps, float* dx, int m, int n) {
  over(m, LEAST / n, [&](size_t i, size_t end) {
    for (; i < end; ++i) rows().rms_norm_vjp(x + i * n, weight, dy + i * n, eps, dx + i * n, n);
  });
}

void rope(const float* x, const float* freqs, float scale, float sign, int offset, bool traditional,
          int n_rows, int t, int d, int dims, float* y) {
  int half = dims / 2;
  std::vector<float> cosine(static_cast<size_t>(t) * half), sine(cosine.size());
  over(t, LEAST / half / 8, [&](size_t i, size_t end) {
    for (; i < end; ++i)
      for (int j = 0; j < half; ++j) {
        float angle = scale * static_cast<float>(offset + static_cast<int>(i)) / freqs[j];
        cosine[i * half + j] = std::cos(angle);
        sine[i * half + j] = sign * std::sin(angle);
      }
  });
  over(static_cast<size_t>(n_rows) * t, LEAST / d, [&](size_t i, size_t end) {
    for (; i < end; ++i) {
      const float* x_i = x + i * d;
      float* y_i = y + i * d;
      size_t at = i % t * half;
      rows().rotate(x_i, &cosine[at], &sine[at], y_i, half, traditional);
      std::copy(x_i + dims, x_i + d, y_i + dims);
    }
  });
}

}  // namespace segtrain::cpu
