// Runs the source of a CUDA kernel on the CPU, one block at a time. Every thread has its own context, and the
// threads of a warp wait for each other at tensor-core matrix products and at shuffles. This header replaces
// cuda/prelude.cu with functions that use no GPU instructions.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __shared__ static  // works because one block runs at a time

using std::min;

namespace emulated {

struct Thread {
  ucontext_t at;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool done;
};

inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline int current;
inline std::function<void()> body;

/// A barrier at which a number of threads wait for each other.
struct Meeting {
  int arrived = 0, round = 0;

  void join(int all) {
    const int own = round;
    if (++arrived == all) arrived = 0, ++round;
    else
      while (round == own) swapcontext(&threads[current].at, &scheduler);
  }
};

inline Meeting block, warps[32];
inline void meet_warp() { warps[current / 32].join(32); }

inline void run_thread() {
  body();
  threads[current].done = true;
}

struct Index {
  int own = -1;
  operator unsigned() const { return own < 0 ? current : own; }
};

}  // namespace emulated

struct {
  emulated::Index x;
} threadIdx;
struct {
  unsigned x;
} blockIdx;

inline void __syncthreads() { emulated::block.join(emulated::threads.size()); }

inline float __shfl_xor_sync(unsigned, float x, int mask) {
  static float values[1024];
  emulated::meet_warp();
  values[emulated::current] = x;
  emulated::meet_warp();
  return values[emulated::current ^ mask];
}

/// Runs `blocks` blocks with `count` threads each.
inline void launch(int blocks, int count, const std::function<void()>& kernel) {
  using namespace emulated;
  body = kernel;
  threads.resize(count);
  for (int i = 0; i < blocks; ++i) {
    blockIdx.x = i;
    for (auto& thread : threads) {
      getcontext(&thread.at);
      thread.at.uc_stack.ss_sp = thread.stack.data();
      thread.at.uc_stack.ss_size = thread.stack.size();
      thread.at.uc_link = &scheduler;
      thread.done = false;
      makecontext(&thread.at, run_thread, 0);
    }
    for (bool left = true; left;) {
      left = false;
      for (current = 0; current < count; ++current)
        if (!threads[current].done) left = true, swapcontext(&scheduler, &threads[current].at);
    }
  }
}

namespace segtrain {

struct half {
  unsigned short bits;
};
struct bfloat16 {
  unsigned short bits;
};

inline float to_float(float x) { return x; }
inline float to_float(half x) {
  _Float16 y;
  std::memcpy(&y, &x, 2);
  return y;
}
inline float to_float(bfloat16 x) {
  const unsigned bits = static_cast<unsigned>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline void put(float& y, float x) { y = x; }
inline void put(half& y, float x) {
  const _Float16 z = x;
  std::memcpy(&y, &z, 2);
}
inline void put(bfloat16& y, float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  y.bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <typename T>
struct alignas(16) Pack {
  T x[8];
};
template <typename T>
constexpr bool is_bfloat16 = false;
template <>
constexpr bool is_bfloat16<bfloat16> = true;

template <typename T>
unsigned pack2(float x, float y) {
  T low, high;
  put(low, x), put(high, y);
  return low.bits | static_cast<unsigned>(high.bits) << 16;
}
template <typename T>
unsigned small_pair(unsigned numbers) {
  return pack2<T>(numbers & 0xffff, numbers >> 16);
}
template <typename T>
float half_of(unsigned pair, int i) {
  T x;
  x.bits = pair >> 16 * i;
  return to_float(x);
}

/// The positions of the elements of a [16, 16], b [16, 8] and c [16, 8] are those in the PTX ISA ("Matrix
/// fragments for mma.m16n8k16").
template <typename T>
void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  static unsigned as[1024][4], bs[1024][2];
  const int lane = emulated::current % 32, first = emulated::current - lane;
  emulated::meet_warp();
  std::copy_n(a, 4, as[emulated::current]);
  bs[emulated::current][0] = b0, bs[emulated::current][1] = b1;
  emulated::meet_warp();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const unsigned x = as[first + row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      const unsigned y = bs[first + col * 4 + k % 8 / 2][k / 8];
      sum += half_of<T>(x, k % 2) * half_of<T>(y, k % 2);
    }
    c[i] += sum;
  }
}

inline int row_of(int i) { return emulated::current % 32 / 4 + i / 2 * 8; }
inline int col_of(int i) { return emulated::current % 4 * 2 + i % 2; }
template <typename P>
P pick(P const (&three)[3], int i) {
  return three[i];
}

}  // namespace segtrain
