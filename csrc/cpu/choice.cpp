// Selects the fastest version of the loops in rows.cpp that this processor supports, and the functions in
// bfloat16.cpp if it supports them.
#include <atomic>

#include "cpu/bfloat16.h"
#include "cpu/rows.h"

namespace segtrain::cpu {

extern const Rows rows_baseline;
#ifdef __x86_64__
extern const Rows rows_avx2, rows_avx512;
extern const Bfloat16 bfloat16_avx512;

namespace {

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

}  // namespace
#endif

const Rows& rows() {
#ifdef __x86_64__
  static const Rows& best = [&]() -> const Rows& {
    if (has_avx512()) return rows_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return rows_avx2;
    return rows_baseline;
  }();
  return best;
#else
  return rows_baseline;
#endif
}

namespace {

std::atomic<bool> rounds{false};

}  // namespace

bool rounds_products() {
  return rounds;
}

bool set_rounds_products(bool on) {
  return rounds.exchange(on);
}

const Bfloat16* bfloat16() {
#ifdef __x86_64__
  static const Bfloat16* found =
      has_avx512() && __builtin_cpu_supports("avx512bf16") ? &bfloat16_avx512 : nullptr;
  return found;
#else
  return nullptr;
#endif
}

}  // namespace segtrain::cpu
