// Code that is common to all kernels: number formats, copies to shared memory, matrix products, and the parameters of
// attention. It is prepended to the text of each kernel file.
namespace segtrain {

constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;

__device__ inline float infinity() { return __int_as_float(0x7f800000); }

// These types replace CUDA's half-precision types, for which the compiler would need a header and its path.
struct half {
  unsigned short bits;
};
struct bfloat16 {
  unsigned short bits;
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ inline float to_float(bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

__device__ inline void put(float& y, float x) { y = x; }
__device__ inline void put(half& y, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
__device__ inline void put(bfloat16& y, float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }

/// Returns x rounded to T.
template <typename T>
__device__ inline float rounded(float x) {
  T y;
  put(y, x);
  return to_float(y);
}

/// 2ˣ; 2^−∞ = 0
__device__ inline float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The absolute error of this function is about 1e-7. The hardware's tanh has an error of 5e-4, which changes a
// probability by 2 % if the softcap is 50.
__device__ inline float tanh_of(float x) { return 1 - __fdividef(2.0f, 1 + exp2_of(2 * LOG2E * x)); }

/// Eight neighbouring elements of a row, which are read and written sixteen bytes at a time.
template <typename T>
struct alignas(16) Pack {
  T x[8];
};

template <typename T>
constexpr bool is_bfloat16 = false;
template <>
constexpr bool is_bfloat16<bfloat16> = true;

/// Packs two half-precision values into one word, with x in the low bits.
template <typename T>
__device__ inline unsigned pack2(float x, float y) {
  unsigned pair;
  if constexpr (is_bfloat16<T>) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
  return pair;
}

/// Converts two integers below 128, which are in the low bits of the two halves of a word, to two half-precision
/// values. The result is exact, and no conversion instruction is needed.
template <typename T>
__device__ inline unsigned small_pair(unsigned numbers) {
  unsigned pair;  // 1·(128 + x) − 128; for float16, 1024 instead of 128
  if constexpr (is_bfloat16<T>)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(numbers | 0x43004300), "r"(0x3f803f80), "r"(0xc300c300));
  else asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(numbers | 0x64006400), "r"(0x3c003c00), "r"(0xe400e400));
  return pair;
}

template <typename T>
__device__ inline float2 unpack2(unsigned bits) {
  struct alignas(4) Pair {
    T x[2];
  } pair = *reinterpret_cast<Pair*>(&bits);
  return make_float2(to_float(pair.x[0]), to_float(pair.x[1]));
}

// ---- shared memory

__device__ inline unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

/// Starts an asynchronous copy of BYTES bytes to shared memory. If `ok` is false, it writes zeros instead.
template <int BYTES>
__device__ inline void copy_async(unsigned to, const void* from, bool ok) {
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(ok ? 16 : 0) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(ok ? 4 : 0) : "memory");
}

__device__ inline void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

template <typename T>
__device__ inline T* shared_tiles() {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  return reinterpret_cast<T*>(shared_bytes);
}

// ---- matrix products on the tensor cores

/// Loads the 16×16 block at x as four 8×8 matrices: rows 0–7 and 8–15 of columns 0–7, then the same rows of columns
/// 8–15.
template <bool TRANSPOSE, typename T>
__device__ inline void load_block(unsigned (&r)[4], const T* x, int ld) {
  int lane = threadIdx.x % 32;
  unsigned from = shared_address(x + lane % 16 * ld + lane / 16 * 8);
  if constexpr (TRANSPOSE)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
}

/// c [16,8] += a [16,16] · b [16,8]
template <typename T>
__device__ inline void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if constexpr (is_bfloat16<T>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// c [16·MT, 8·NT] += a [16·MT, 16] · b, where b is stored as [8·NT, 16], or as [16, 8·NT] if B_DOWN is set.
template <typename T, bool B_DOWN, int MT, int NT>
__device__ inline void step(float (&c)[MT][NT][4], const unsigned (&a)[MT][4], const T* b, int ldb) {
#pragma unroll
  for (int n = 0; n < NT; n += 2) {
    unsigned r[4];
    load_block<B_DOWN>(r, B_DOWN ? b + n * 8 : b + n * 8 * ldb, ldb);
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      multiply_add<T>(c[m][n], a[m], r[0], B_DOWN ? r[1] : r[2]);
      multiply_add<T>(c[m][n + 1], a[m], B_DOWN ? r[2] : r[1], r[3]);
    }
  }
}

/// Element i of a thread's accumulator tile is in row row_of(i) and column col_of(i) of the 16×8 tile.
__device__ inline int row_of(int i) { return threadIdx.x % 32 / 4 + i / 2 * 8; }
__device__ inline int col_of(int i) { return threadIdx.x % 4 * 2 + i % 2; }

// ---- matrix products of a Hopper warpgroup (wgmma). The operands are tiles in shared memory. A tile consists of
// blocks of 64 columns, whose rows have 128 bytes. The sixteen-byte pieces of a row are permuted depending on the row
// (the 128-byte swizzle), so a tile can be read by rows or by columns.

constexpr int ALIGN = 1024;
__device__ inline unsigned tiles_begin() { return shared_address(shared_tiles<char>()) + ALIGN - 1 & -ALIGN; }
constexpr int block_bytes(int rows) { return rows * 128; }

/// Returns the descriptor of a matrix for wgmma. `next_block` is the distance in bytes between blocks of 64 columns; it
/// is used only if these columns are rows or columns of the result. Groups of eight rows are 1024 bytes apart.
__device__ inline unsigned long long operand(unsigned address, int next_block = 16) {
  return (address & 0x3ffff) >> 4 | static_cast<unsigned long long>(next_block >> 4) << 16 | 64ull << 32 | 1ull << 62;
}

#define N10(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define N30 N10() N10(1) N10(2)
#define N60 N30 N10(3) N10(4) N10(5)
#define N90 N60 N10(6) N10(7) N10(8)
#define N128 N90 N10(9) N10(10) N10(11) "%120,%121,%122,%123,%124,%125,%126,%127"
#define C4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define C16(i) C4(i), C4(i + 4), C4(i + 8), C4(i + 12)
#define C32(i) C16(i), C16(i + 16)
#define FROM_SHARED "l"(a), "l"(b), "n"(A_DOWN), "n"(B_DOWN), "n"(ADD)
#define FROM_REGISTERS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(B_DOWN), "n"(ADD)
#define WGMMA(from, n, type, numbers, inputs, add_at, ...)                                                                 \
  asm volatile("{.reg .pred add; setp.ne.u32 add, " add_at ", 0;\n wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." \
               type " {" numbers "}, " inputs ";}" : __VA_ARGS__ : FROM_##from)
#define WGMMA_OF(from, n, numbers, inputs, add_at, ...)                                           \
  if constexpr (is_bfloat16<T>) WGMMA(from, n, "bf16", numbers, inputs, add_at, __VA_ARGS__); \
  else WGMMA(from, n, "f16", numbers, inputs, add_at, __VA_ARGS__)

/// c [64, 2·N] += a [64, 16]·b [16, 2·N]; if ADD is false, c is overwritten. The axis of length 16 runs along the
/// stored rows of an operand, or along its columns if A_DOWN or B_DOWN is set.
template <bool A_DOWN, bool B_DOWN, typename T, bool ADD = true, int N>
__device__ inline void multiply(float (&c)[N], unsigned long long a, unsigned long long b) {
  static_assert(N == 32 || N == 64 || N == 96 || N == 128);
  if constexpr (N == 32) {
    WGMMA_OF(SHARED, 64, N30 "%30,%31", "%32, %33, add, 1, 1, %34, %35", "%36", C32(0));
  } else if constexpr (N == 64) {
    WGMMA_OF(SHARED, 128, N60 "%60,%61,%62,%63", "%64, %65, add, 1, 1, %66, %67", "%68", C32(0), C32(32));
  } else if constexpr (N == 96) {
    WGMMA_OF(SHARED, 192, N90 "%90,%91,%92,%93,%94,%95", "%96, %97, add, 1, 1, %98, %99", "%100", C32(0), C32(32), C32(64));
  } else {
    WGMMA_OF(SHARED, 256, N128, "%128, %129, add, 1, 1, %130, %131", "%132", C32(0), C32(32), C32(64), C32(96));
  }
}

/// Does the same for an `a` in registers. a has the layout of a 16×16 block in a warp: two elements of row 0 and two of
/// row 8 in columns 0–7, then the same in columns 8–15.
template <bool B_DOWN, typename T, bool ADD = true, int N>
__device__ inline void multiply(float (&c)[N], const unsigned* a, unsigned long long b) {
  static_assert(N == 32 || N == 64 || N == 96 || N == 128);
  if constexpr (N == 32) {
    WGMMA_OF(REGISTERS, 64, N30 "%30,%31", "{%32, %33, %34, %35}, %36, add, 1, 1, %37", "%38", C32(0));
  } else if constexpr (N == 64) {
    WGMMA_OF(REGISTERS, 128, N60 "%60,%61,%62,%63", "{%64, %65, %66, %67}, %68, add, 1, 1, %69", "%70", C32(0), C32(32));
  } else if constexpr (N == 96) {
    WGMMA_OF(REGISTERS, 192, N90 "%90,%91,%92,%93,%94,%95", "{%96, %97, %98, %99}, %100, add, 1, 1, %101", "%102", C32(0),
             C32(32), C32(64));
  } else {
    WGMMA_OF(REGISTERS, 256, N128, "{%128, %129, %130, %131}, %132, add, 1, 1, %133", "%134", C32(0), C32(32), C32(64),
             C32(96));
  }
}

/// Prevents the compiler from using these registers for anything else before this point, because it does not know that
/// matrix products still read or write them.
template <int N>
__device__ inline void keep(float (&c)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(c[i])::"memory");
}
template <int N>
__device__ inline void keep(unsigned (&c)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(c[i])::"memory");
}
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// Waits until this warpgroup's matrix products are done, except for the last AHEAD groups of products.
template <int AHEAD>
__device__ inline void products_done() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(AHEAD) : "memory");
}

/// These functions return the position of a thread's accumulators in the warpgroup's result. Each thread has two rows (r
/// = 0 and 1) and, in each block n of 8 columns, two neighbouring columns.
__device__ inline int warpgroup() { return threadIdx.x / 128; }
__device__ inline int result_row(int r) { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + r * 8; }
__device__ inline int result_col(int n) { return n * 8 + threadIdx.x % 4 * 2; }

// ---- a call to attention

struct Call {
  int B, H, G, T, S, q_start;
  float scale, cap;
  const int* first;

  /// Returns the first key that query t sees. For t ≥ T it returns the value of the last query.
  __device__ int first_of(int t) const { return first[min(t, T - 1)]; }
  __device__ bool sees(int t, int key) const { return first_of(t) <= key && key <= q_start + t; }
  /// Returns whether all queries [q0, q1) see all keys [k0, k1).
  __device__ bool all_seen(int q0, int q1, int k0, int k1) const {
    return first_of(q1 - 1) <= k0 && k1 <= q_start + q0 + 1;
  }
};

__device__ inline Call make_call(const int* first, const int* at, const float* args) {
  return {at[2], at[3], at[4], at[5], at[6], at[0], args[0], args[1], first};
}

/// Computes s' = cap·tanh(s·scale/cap), or s·scale without a cap, in units of log 2, and (ds'/ds) / scale.
template <bool CAP>
struct Score {
  float in, out;
  __device__ explicit Score(const Call& c) : in(CAP ? c.scale / c.cap : c.scale * LOG2E), out(CAP ? c.cap * LOG2E : 1) {}
  __device__ float operator()(float s) const { return CAP ? out * tanh_of(s * in) : s * in; }
  __device__ float slope(float y) const { return CAP ? 1 - (y / out) * (y / out) : 1; }
};

/// The work of a thread block for a tile of queries. Long rows come first, because with a causal mask the last tiles
/// need the most work.
struct QueryTile {
  size_t bh, bg;
  int q0, rows, k_begin, k_end;
  __device__ QueryTile(const Call& c, int BQ) {
    int heads = c.B * c.H, tiles = (c.T + BQ - 1) / BQ;
    bh = blockIdx.x % heads;
    bg = bh / c.H * c.G + bh % c.H / (c.H / c.G);
    q0 = (tiles - 1 - blockIdx.x / heads) * BQ;
    rows = min(BQ, c.T - q0);
    k_begin = c.first[q0];
    k_end = c.q_start + q0 + rows;
  }
};

/// Returns the first query whose range of keys begins at `key` or later.
__device__ inline int queries_before(const Call& c, int key) {
  int low = 0, high = c.T;
  while (low < high) {
    int middle = (low + high) / 2;
    if (c.first[middle] < key) low = middle + 1;
    else high = middle;
  }
  return low;
}

/// Returns three[i]. A subscript that is not a compile-time constant would move the array to local memory.
template <typename P>
__device__ inline P pick(P const (&three)[3], int i) {
  return i == 0 ? three[0] : i == 1 ? three[1] : three[2];
}

/// Returns, in every thread, the maximum or the sum of the values of all threads in the block.
template <bool MAX>
__device__ inline float block_reduce(float x) {
  __shared__ float warps[32];
  auto both = [](float a, float b) { return MAX ? fmaxf(a, b) : a + b; };
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x = both(x, __shfl_xor_sync(~0u, x, lane));
  __syncthreads();  // after this barrier, all threads have read the results of the previous reduction
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = threadIdx.x % 32 < blockDim.x / 32 ? warps[threadIdx.x % 32] : MAX ? -infinity() : 0;
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x = both(x, __shfl_xor_sync(~0u, x, lane));
  return x;
}

/// Computes Σ x·y for each row, with one warp per row. For x = o and y = do, this is delta.
template <typename T>
__device__ void row_dot(const T* x, const T* y, int rows, int cols, float* sum) {
  const int row = blockIdx.x * 8 + threadIdx.x / 32;
  if (row >= rows) return;
  float all = 0;
  for (int col = threadIdx.x % 32 * 8; col < cols; col += 256) {
    const Pack<T> a = *reinterpret_cast<const Pack<T>*>(x + static_cast<size_t>(row) * cols + col);
    const Pack<T> b = *reinterpret_cast<const Pack<T>*>(y + static_cast<size_t>(row) * cols + col);
#pragma unroll
    for (int i = 0; i < 8; ++i) all += to_float(a.x[i]) * to_float(b.x[i]);
  }
#pragma unroll
  for (int i = 16; i > 0; i /= 2) all += __shfl_xor_sync(~0u, all, i);
  if (threadIdx.x % 32 == 0) sum[row] = all;
}

}  // namespace segtrain
