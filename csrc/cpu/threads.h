// Threads and scratch memory of the CPU kernels.
#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>

#include "mlx/allocator.h"

namespace segtrain::cpu {

/// Returns the number of processors that this process may use, or the value of $MLX_SEGTRAIN_THREADS if it is
/// set.
int n_threads();

/// Runs job(0) … job(n − 1) on all threads, including the caller's, and returns when all are done. Jobs are
/// started in order, but any thread may run any job, so results must not depend on which thread runs a job.
void parallel_for(int n, const std::function<void(int)>& job);

/// Returns the length of the equal ranges into which n items are split to keep every thread busy. The length
/// is limited to `most` and then rounded up to a multiple of `align`.
int split(int n, int most, int align);

constexpr size_t WORTH_A_THREAD = 1 << 14;  ///< minimum number of floats per thread in an elementwise pass

/// Calls run(begin, end) in parallel for ranges that cover [0, n). If n ≥ least, each range except the last
/// has at least `least` items.
template <class Run>
void over(size_t n, size_t least, const Run& run) {
  size_t runs = std::clamp<size_t>(n / std::max<size_t>(least, 1), 1, 4 * n_threads());
  size_t length = (n + runs - 1) / runs;
  parallel_for(static_cast<int>(runs), [&](int job) {
    size_t begin = std::min(n, job * length), end = std::min(n, begin + length);
    if (begin < end) run(begin, end);
  });
}

/// Floats from MLX's allocator, so that mx.get_peak_memory() includes scratch memory.
class Scratch {
 public:
  explicit Scratch(size_t n) : data_(mlx::core::allocator::malloc(n * sizeof(float))) {}
  operator float*() const { return as<float>(); }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_.buffer().raw_ptr());
  }

 private:
  mlx::core::allocator::Data data_;
};

}  // namespace segtrain::cpu
