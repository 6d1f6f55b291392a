// Threads and scratch memory of the CPU kernels.
#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>

#include "mlx/allocator.h"

namespace segtrain::cpu {

/// Processors this process may use, or MLX_SEGTRAIN_THREADS.
int n_threads();

/// Runs job(0) … job(n − 1) on all threads, the caller's included; returns when all are done.
/// Jobs are handed out in order, so results must not depend on which thread takes one.
void parallel_for(int n, const std::function<void(int)>& job);

/// Splits n things into equal runs of at most `most`, a multiple of `align`, with every thread busy: length
/// of a run.
int split(int n, int most, int align);

constexpr size_t WORTH_A_THREAD = 1 << 14;  ///< floats of an elementwise pass

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

/// Floats from MLX's allocator, so that scratch shows in mx.get_peak_memory().
class Scratch {
 public:
  explicit Scratch(size_t n) : data_(mlx::core::allocator::malloc(n * sizeof(float))) {}
  operator float*() const { return static_cast<float*>(data_.buffer().raw_ptr()); }

 private:
  mlx::core::allocator::Data data_;
};

}  // namespace segtrain::cpu
