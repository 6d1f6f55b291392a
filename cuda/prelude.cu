// What the kernels share: numbers in float32, sixteen-byte packs, reductions of fixed order. Goes before each kernel text.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace segtrain {

constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;

__device__ inline float infinity() { return __int_as_float(0x7f800000); }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void put(float& y, float x) { y = x; }
__device__ inline void put(__half& y, float x) { y = __float2half_rn(x); }
__device__ inline void put(__nv_bfloat16& y, float x) { y = __float2bfloat16_rn(x); }

/// 2ˣ; 2^−∞ = 0
__device__ inline float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Absolute error near 1e-7. The hardware's tanh has 5e-4, which a cap of 50 would turn into 2 % of a probability.
__device__ inline float tanh_of(float x) { return 1 - __fdividef(2.0f, 1 + exp2_of(2 * LOG2E * x)); }

/// Eight neighbours of a row, moved in sixteen-byte pieces.
template <typename T>
struct alignas(16) Pack {
  T x[8];
};

}  // namespace segtrain
