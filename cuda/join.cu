// Concatenates up to 64 arrays. The host code is in csrc/core/join.cpp.
//
// Array i is copied to elements ends[i - 1] … ends[i] of joined [ends[last]]. The blocks with blockIdx.y = i copy array
// i, and each thread copies 16 elements.

namespace segtrain {

constexpr int ARRAYS = 64;

__device__ inline void join(const float* const (&arrays)[ARRAYS], const int* ends, float* joined) {
  const float* x = nullptr;
#pragma unroll
  for (int i = 0; i < ARRAYS; ++i)  // with an index known only at run time, all pointers would be in local memory
    if (i == blockIdx.y) x = arrays[i];
  const int begin = blockIdx.y ? ends[blockIdx.y - 1] : 0, n = ends[blockIdx.y] - begin;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const int i = (blockIdx.x * 16 + j) * blockDim.x + threadIdx.x;
    if (i < n) joined[begin + i] = x[i];
  }
}

}  // namespace segtrain

// Kernel bodies. The line before each body names the kernel, its inputs and its outputs.

//: join: x0 x1 x2 x3 x4 x5 x6 x7 x8 x9 x10 x11 x12 x13 x14 x15 x16 x17 x18 x19 x20 x21 x22 x23 x24 x25 x26 x27 x28 x29 x30 x31 x32 x33 x34 x35 x36 x37 x38 x39 x40 x41 x42 x43 x44 x45 x46 x47 x48 x49 x50 x51 x52 x53 x54 x55 x56 x57 x58 x59 x60 x61 x62 x63 ends -> joined
join({x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15, x16, x17, x18, x19, x20, x21, x22, x23, x24,
      x25, x26, x27, x28, x29, x30, x31, x32, x33, x34, x35, x36, x37, x38, x39, x40, x41, x42, x43, x44, x45, x46, x47,
      x48, x49, x50, x51, x52, x53, x54, x55, x56, x57, x58, x59, x60, x61, x62, x63}, ends, joined);
