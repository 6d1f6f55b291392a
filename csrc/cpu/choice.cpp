// Selects the fastest version of the loops in rows.cpp that this processor supports.
#include "cpu/rows.h"

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

}  // namespace segtrain::cpu
