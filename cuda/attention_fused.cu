// Attention on Hopper that never writes scores to device memory. See docs/attention.md, "hopper";
// csrc/ops/attention/hopper_fused.cpp launches these kernels. As in FlashAttention-3 (Shah et al. 2024,
// arXiv:2407.08608), some warps copy while others multiply, and the matrix products of one tile run while the softmax
// of another tile is computed.
//
// The shapes are those in attention.cu; b and h are indices into batch and query heads. attention_fused uses one block
// per (192 or 128 queries, b, h). Each group of 128 threads computes 64 of the block's queries.
//
// attention_fused_vjp uses one block per (128 keys, b, h). The block keeps dk and dv of its keys in registers and
// iterates over the queries that see these keys, starting with the last queries; dq is summed in device memory. To make
// results bit-identical, blocks that add to the same sum do so in a fixed order: the order of the keys for dq, and the
// order of the group's heads for dk and dv. Each block waits for its turn. It cannot wait forever, because blocks take
// numbered tickets for their work: every block that it waits for has an earlier ticket, and therefore is running or has
// finished.

namespace segtrain {

// ---- synchronization with barriers in shared memory (mbarrier), whose phases alternate between 0 and 1

__device__ inline void init_barrier(unsigned at, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}
__device__ inline void arrive(unsigned at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}
/// Arrives at the barrier once per warp, when all threads of the warp have reached this point.
__device__ inline void warp_arrives(unsigned at) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) arrive(at);
}
/// Makes this thread arrive at the barrier as soon as all copies that it has started are complete.
__device__ inline void arrive_with_copies(unsigned at) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(at) : "memory");
}
__device__ inline void wait(unsigned at, unsigned phase) {
  asm volatile("{.reg .pred done;\nagain:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n @!done bra again;}"
               ::"r"(at), "r"(phase) : "memory");
}

/// Makes all writes to shared memory that this thread can see visible to later reads by tensor cores and bulk copies.
__device__ inline void publish() { asm volatile("fence.proxy.async;" ::: "memory"); }

/// Waits at the barrier `from`, publishes the data, and arrives at the barrier `to`. Only threads without matrix
/// products call this function, because the fence in publish() waits for the calling thread's matrix products. (In
/// threads that multiply, the fence was measured to take a quarter of the time.)
__device__ inline void relay(unsigned from, unsigned to, unsigned phase) {
  wait(from, phase);
  publish();
  arrive(to);
}

/// A barrier for some warps of the block. `meet` arrives and waits; `tell` only arrives.
__device__ inline void meet(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ inline void tell(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

template <int REGISTERS>
__device__ inline void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
template <int REGISTERS>
__device__ inline void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }

/// A position in a ring buffer of stages, and the phase of the barriers at this position.
template <int STAGES>
struct Turn {
  int stage = 0;
  unsigned phase = 0;
  __device__ void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

/// Copies x [rows, D] to the tile [ROWS, columns in blocks of 64], with THREADS threads, and fills the rest of the tile
/// with zeros.
template <int ROWS, int D, int THREADS, typename T>
__device__ inline void copy_rows(unsigned tile, const T* x, int rows, int thread) {
  constexpr int BLOCKS = (D + 63) / 64, STEP = THREADS / 8, AT_ONCE = STEP < 8 ? 16 : 2 * STEP;
  static_assert(ROWS % AT_ONCE == 0 && AT_ONCE % 8 == 0);
  const int row = thread / 8, piece = thread % 8;
  x += static_cast<ptrdiff_t>(row) * D + piece * 8;
  tile += row * 128;
  rows -= row;
#pragma unroll 1
  for (int done = 0; done < ROWS; done += AT_ONCE, rows -= AT_ONCE, x += AT_ONCE * D, tile += AT_ONCE * 128)
#pragma unroll
    for (int r = 0; r < AT_ONCE; r += STEP)
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block)
        copy_async<16>(tile + r * 128 + ((piece ^ (row + r) % 8) << 4) + block * block_bytes(ROWS), x + r * D + block * 64,
                       r < rows && (D % 64 == 0 || piece * 8 + block * 64 < D));
}

/// Returns the address of piece `col` in a row of a tile. A piece has 16 bytes, and `block` is the size of a block of 64
/// columns in bytes.
__device__ inline unsigned piece_at(int row, int col, int block) {
  return col / 8 * block + row * 128 + ((col % 8 ^ row % 8) << 4);
}

/// Writes a 16×16 block from a warp's registers. Its first row is `row`, and its first column is that of `piece`.
__device__ inline void store_block(unsigned tile, int row, int piece, int block, const unsigned (&x)[4]) {
  const int lane = threadIdx.x % 32;
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(tile + piece_at(row + lane % 16, piece + lane / 16, block)), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

template <typename X>
__device__ inline X read_shared(unsigned at) {
  X x;
  if constexpr (sizeof(X) == 16)
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at) : "memory");
  else if constexpr (sizeof(X) == 8)
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(at) : "memory");
  else
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(at) : "memory");
  return x;
}
__device__ inline float2 read_floats(unsigned at) {
  const uint2 x = read_shared<uint2>(at);
  return make_float2(__uint_as_float(x.x), __uint_as_float(x.y));
}

// ---- o, lse

/// The parameters for each head size: the number of thread groups that multiply, the number of queries and keys per
/// tile, and the number of registers per thread after setmaxnreg (a block starts with 128 or 168 per thread).
template <int D>
struct Forward {
  static constexpr int DP = (D + 63) / 64 * 64, GROUPS = DP == 64 ? 3 : 2, BQ = 64 * GROUPS, BK = DP <= 128 ? 128 : 64;
  static constexpr int THREADS = 128 * (GROUPS + 1), COPIERS = 64, STAGES = 2;
  static constexpr int COPY_REGISTERS = GROUPS == 3 ? 32 : 40, REGISTERS = GROUPS == 3 ? 160 : 232;
  static constexpr int TILE_BYTES = BK * DP * 2, Q_BYTES = BQ * DP * 2;
  static constexpr int BYTES = ALIGN + Q_BYTES + 2 * STAGES * TILE_BYTES + 256;
};

template <int D, bool CAP, typename T>
__device__ void attention_fused(const T* q, const T* k, const T* v, Call c, T* o, float* lse) {
  using X = Forward<D>;
  constexpr int BQ = X::BQ, BK = X::BK, DP = X::DP, STAGES = X::STAGES;
  const QueryTile t(c, BQ);
  const int tiles = (t.k_end - t.k_begin + BK - 1) / BK;
  const unsigned q_tile = tiles_begin(), k_tiles = q_tile + X::Q_BYTES, v_tiles = k_tiles + STAGES * X::TILE_BYTES;
  // Each buffer has barriers that signal that its data is copied, is published, or is no longer needed.
  const unsigned q_copied = v_tiles + STAGES * X::TILE_BYTES, k_copied = q_copied + 8, v_copied = k_copied + 8 * STAGES;
  const unsigned q_here = v_copied + 8 * STAGES, k_here = q_here + 8, v_here = k_here + 8 * STAGES;
  const unsigned k_free = v_here + 8 * STAGES, v_free = k_free + 8 * STAGES;
  if (threadIdx.x == 0) {
    init_barrier(q_copied, X::COPIERS), init_barrier(q_here, 1);
    for (int i = 0; i < 8 * STAGES; i += 8) {
      init_barrier(k_copied + i, X::COPIERS), init_barrier(k_here + i, 1), init_barrier(k_free + i, 4 * X::GROUPS);
      init_barrier(v_copied + i, X::COPIERS), init_barrier(v_here + i, 1), init_barrier(v_free + i, 4 * X::GROUPS);
    }
  }
  __syncthreads();

  if (warpgroup() == 0) {
    fewer_registers<X::COPY_REGISTERS>();
    Turn<STAGES> turn;
    if (threadIdx.x < X::COPIERS) {
      copy_rows<BQ, D, X::COPIERS>(q_tile, q + (t.bh * c.T + t.q0) * D, t.rows, threadIdx.x);
      arrive_with_copies(q_copied);
      const size_t from = (t.bg * c.S + t.k_begin) * D;
      k += from, v += from;
      int rows = c.S - t.k_begin;
      for (int i = 0; i < tiles; ++i, turn.next(), rows -= BK, k += BK * D, v += BK * D) {
        wait(k_free + 8 * turn.stage, turn.phase ^ 1);
        copy_rows<BK, D, X::COPIERS>(k_tiles + turn.stage * X::TILE_BYTES, k, rows, threadIdx.x);
        arrive_with_copies(k_copied + 8 * turn.stage);
        wait(v_free + 8 * turn.stage, turn.phase ^ 1);
        copy_rows<BK, D, X::COPIERS>(v_tiles + turn.stage * X::TILE_BYTES, v, rows, threadIdx.x);
        arrive_with_copies(v_copied + 8 * turn.stage);
      }
      wait_copies();
    } else if (threadIdx.x == X::COPIERS) {
      relay(q_copied, q_here, 0);
      for (int i = 0; i < tiles; ++i, turn.next()) relay(k_copied + 8 * turn.stage, k_here + 8 * turn.stage, turn.phase);
    } else if (threadIdx.x == X::COPIERS + 32) {
      for (int i = 0; i < tiles; ++i, turn.next()) relay(v_copied + 8 * turn.stage, v_here + 8 * turn.stage, turn.phase);
    }
    return;
  }

  more_registers<X::REGISTERS>();
  const int group = warpgroup() - 1, q0 = t.q0 + group * 64;
  // Scores are kept unscaled; multiplying them by `fold` converts them to exponents of 2. `fold` is positive, so the
  // multiplication preserves order and −∞.
  const float fold = CAP ? 1 : fmaxf(fabsf(c.scale) * LOG2E, 1e-30f);
  const Score<CAP> score(c);
  const int seen_from = c.first_of(q0 + 63), seen_to = c.q_start + q0 + 1;
  int begin[2], end[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) begin[r] = c.first_of(q0 + result_row(r)), end[r] = c.q_start + q0 + result_row(r);

  float s[BK / 2], sum[DP / 2], m[2] = {-infinity(), -infinity()}, l[2] = {}, shrink[2];
  unsigned p[BK / 4];
#pragma unroll
  for (int i = 0; i < DP / 2; ++i) sum[i] = 0;
  Turn<STAGES> k_turn, v_turn;

  /// S = scale·q·kᵀ, capped
  auto multiply_keys = [&] {
    const unsigned tile = k_tiles + k_turn.stage * X::TILE_BYTES;
    keep(s);
    begin_products();
#pragma unroll
    for (int x = 0; x < DP; x += 16) {
      const auto a = operand(q_tile + x / 64 * block_bytes(BQ) + group * block_bytes(64) + x % 64 * 2);
      const auto b = operand(tile + x / 64 * block_bytes(BK) + x % 64 * 2);
      if (x == 0) multiply<false, false, T, false>(s, a, b);
      else multiply<false, false, T>(s, a, b);
    }
    end_products();
  };
  auto keys_done = [&] {
    keep(s);
    warp_arrives(k_free + 8 * k_turn.stage);
    k_turn.next();
  };

  /// Online softmax: rescales the sums, which are relative to the old maximum.
  auto softmax = [&](int k0) {
    if (CAP || c.scale < 0)
#pragma unroll
      for (int i = 0; i < BK / 2; ++i) s[i] = CAP ? score(s[i]) : -s[i];
    if (k0 < seen_from || k0 + BK > seen_to) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int from = begin[r] - k0, to = end[r] - k0;
#pragma unroll
        for (int n = 0; n < BK / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (result_col(n) + e < from || result_col(n) + e > to) s[n * 4 + r * 2 + e] = -infinity();
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = s[r * 2];
#pragma unroll
      for (int n = 0; n < BK / 8; ++n) top = fmaxf(top, fmaxf(s[n * 4 + r * 2], s[n * 4 + r * 2 + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      top = fmaxf(top, m[r]);
      const float base = top == -infinity() ? 0 : top * fold;
      shrink[r] = exp2_of(m[r] * fold - base);
      m[r] = top;
      float more = 0;
#pragma unroll
      for (int n = 0; n < BK / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[n * 4 + r * 2 + e];
          x = exp2_of(x * fold - base);
          more += x;
        }
      l[r] = l[r] * shrink[r] + more;
    }
  };
  auto pack = [&] {
#pragma unroll
    for (int i = 0; i < BK / 4; ++i) p[i] = pack2<T>(s[i * 2], s[i * 2 + 1]);
  };

  /// O += P·V
  auto multiply_values = [&] {
    const unsigned tile = v_tiles + v_turn.stage * X::TILE_BYTES;
    wait(v_here + 8 * v_turn.stage, v_turn.phase);
    keep(p);
    keep(sum);
    begin_products();
#pragma unroll
    for (int x = 0; x < BK; x += 16) multiply<true, T>(sum, p + x / 4, operand(tile + x * 128, block_bytes(BK)));
    end_products();
  };

  // If there are two groups, they start their matrix products alternately, so that one group computes its softmax while
  // the products of the other group run.
  constexpr bool TURNS = X::GROUPS == 2;
  wait(q_here, 0);
  if (tiles > 0) {
    wait(k_here, 0);
    multiply_keys();
    products_done<0>();
    keys_done();
    softmax(t.k_begin);
    pack();
    if (TURNS && group == 1) tell(1, 256);
    for (int i = 1; i < tiles; ++i) {
      wait(k_here + 8 * k_turn.stage, k_turn.phase);
      if (TURNS) meet(1 + group, 256);
      multiply_keys();
      multiply_values();
      if (TURNS) tell(2 - group, 256);
      products_done<1>();
      keys_done();
      softmax(t.k_begin + i * BK);
      products_done<0>();
      keep(sum);
      keep(p);
      warp_arrives(v_free + 8 * v_turn.stage);
      v_turn.next();
#pragma unroll
      for (int n = 0; n < DP / 2; ++n) sum[n] *= shrink[n / 2 % 2];
      pack();
    }
    multiply_values();
    products_done<0>();
    keep(sum);
  }

  /// O/l, lse = m + log l
  const int lane = threadIdx.x % 32, row0 = group * 64 + threadIdx.x % 128 / 32 * 16;
  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    l[r] += __shfl_xor_sync(~0u, l[r], 1);
    l[r] += __shfl_xor_sync(~0u, l[r], 2);
    inverse[r] = l[r] > 0 ? 1 / l[r] : 0;
    const int row = group * 64 + result_row(r);
    if (threadIdx.x % 4 == 0 && row < t.rows)
      lse[t.bh * c.T + t.q0 + row] = l[r] > 0 ? m[r] * fold * LN2 + logf(l[r]) : -infinity();
  }
  // The output is first collected in the shared memory for this warp's queries, which no other warp reads, so that
  // whole cache lines are written to device memory.
#pragma unroll
  for (int n = 0; n < DP / 8; n += 2) {
    const unsigned block[4] = {pack2<T>(sum[n * 4] * inverse[0], sum[n * 4 + 1] * inverse[0]),
                               pack2<T>(sum[n * 4 + 2] * inverse[1], sum[n * 4 + 3] * inverse[1]),
                               pack2<T>(sum[n * 4 + 4] * inverse[0], sum[n * 4 + 5] * inverse[0]),
                               pack2<T>(sum[n * 4 + 6] * inverse[1], sum[n * 4 + 7] * inverse[1])};
    store_block(q_tile, row0, n, block_bytes(BQ), block);
  }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < 2 * DP; i += 32) {
    const int row = row0 + i / (DP / 8), col = i % (DP / 8);
    if (row < t.rows && col * 8 < D)
      *reinterpret_cast<uint4*>(o + (t.bh * c.T + t.q0 + row) * D + col * 8) =
          read_shared<uint4>(q_tile + piece_at(row, col, block_bytes(BQ)));
  }
}

// ---- dq, dk, dv

/// For each query tile of a head, the range of key tiles that it sees, and for each key tile, the range of query tiles
/// that see it. Both bounds of a range are non-decreasing in the tile's index.
template <int BQ, int BK>
struct Pairs {
  const Call& c;
  __device__ int query_tiles() const { return (c.T + BQ - 1) / BQ; }
  __device__ int key_tiles() const { return (c.S + BK - 1) / BK; }
  __device__ int keys_begin(int tile) const { return c.first[tile * BQ] / BK; }
  __device__ int keys_end(int tile) const { return (c.q_start + min(c.T, (tile + 1) * BQ) - 1) / BK + 1; }
  __device__ int queries_begin(int key_tile) const { return max(0, key_tile * BK - c.q_start) / BQ; }
  __device__ int queries_end(int key_tile) const {
    return key_tile < keys_end(query_tiles() - 1) ? (queries_before(c, (key_tile + 1) * BK) + BQ - 1) / BQ : 0;
  }
  /// Returns the number of counters: one for tickets, and one for each tile of dq and each tile of dk and dv, which
  /// counts the blocks that have added to the tile.
  __device__ int counts() const { return 1 + c.B * c.H * query_tiles() + c.B * c.G * key_tiles(); }
};

template <int D>
struct Backward {
  static constexpr int DP = (D + 63) / 64 * 64, BQ = DP == 64 ? 128 : 64, BK = 128;
  static constexpr int THREADS = 384, COPY_REGISTERS = 24, REGISTERS = 240, Q_STAGES = 3, DO_STAGES = 2;
  // The number of heads of a group that are processed concurrently is doubled until there are this many blocks. Blocks
  // for different heads wait for each other at the end, when they add to dk and dv. Blocks for different key tiles of
  // one head wait for each other at the beginning, when they first add to dq.
  static constexpr int AT_ONCE = DP == 64 ? 1024 : 256;
  static constexpr int KEY_BYTES = BK * DP * 2, QUERY_BYTES = BQ * DP * 2, DS_BYTES = BK * BQ * 2, DQ_BYTES = BQ * DP * 4;
  static constexpr int ROWS_BYTES = BQ * 4, SUM_SIZE = BK * DP;
  // The terms are: k and v; the stages of q and do; two tiles of dS; dq; lse and `first` for each stage of q, and delta
  // for each stage of do; barriers.
  static constexpr int BYTES = ALIGN + 2 * KEY_BYTES + (Q_STAGES + DO_STAGES) * QUERY_BYTES + 2 * DS_BYTES + DQ_BYTES +
                               (2 * Q_STAGES + DO_STAGES) * ROWS_BYTES + 256;
  static_assert(2 * KEY_BYTES >= SUM_SIZE * 4 && (Q_STAGES + DO_STAGES) * QUERY_BYTES >= SUM_SIZE * 4);
};

/// Computes delta = Σ o·do and sets the counters to zero.
template <int D, typename T>
__device__ void begin_vjp(const T* o, const T* d_o, Call c, float* delta, int* counts) {
  row_dot(o, d_o, c.B * c.H * c.T, D, delta);
  const int n = Pairs<Backward<D>::BQ, Backward<D>::BK>{c}.counts();
  for (int i = blockIdx.x * 256 + threadIdx.x; i < n; i += gridDim.x * 256) counts[i] = 0;
}

/// Copies one value for each row of a tile, using one warp. Beyond the last row, the value is that of the last row if
/// REPEAT is set, and 0 otherwise.
template <int ROWS, bool REPEAT, typename X>
__device__ inline void copy_numbers(unsigned to, const X* x, int rows, int lane) {
#pragma unroll
  for (int i = lane; i < ROWS; i += 32) copy_async<4>(to + i * 4, x + min(i, rows - 1), REPEAT || i < rows);
}

/// wait_for_turn waits until `turn` other blocks have added to the sum; end_turn signals that this block has added.
__device__ inline void wait_for_turn(const int* count, int turn) {
  for (;;) {
    int now;
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(now) : "l"(count) : "memory");
    if (now == turn) return;
    __nanosleep(20);
  }
}
__device__ inline void end_turn(int* count) { asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(count) : "memory"); }

/// Starts a bulk copy of floats from shared memory to `to` [bytes / 4], or a bulk addition to `to`. Call it from one
/// thread.
__device__ inline void store_bulk(float* to, unsigned from, int bytes, bool add) {
  if (add)
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
                 ::"l"(to), "r"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
                 ::"l"(to), "r"(from), "r"(bytes) : "memory");
}
__device__ inline void end_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ inline void stores_have_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ inline void stores_done() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  publish();
}

/// Stores the accumulators of a group as float4s, one per thread at a time, so that neighbouring threads write
/// neighbouring memory.
template <int N>
__device__ inline void store_sums(unsigned tile, const float (&x)[N]) {
  const unsigned to = tile + (warpgroup() - 1) * N * 512 + threadIdx.x % 128 * 16;
#pragma unroll
  for (int i = 0; i < N / 4; ++i)
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to + i * 2048), "f"(x[i * 4]), "f"(x[i * 4 + 1]),
                 "f"(x[i * 4 + 2]), "f"(x[i * 4 + 3]) : "memory");
}

template <bool FIRST, int N, int M>
__device__ inline auto& pick_array(float (&a)[N], float (&b)[M]) {
  if constexpr (FIRST) return a;
  else return b;
}

/// `counts` has the layout of Pairs and must contain zeros at the start. dq_sum, dk_sum and dv_sum consist of tiles,
/// not yet multiplied by the scale, whose elements are in the order of the threads that computed them.
template <int D, bool CAP, typename T>
__device__ void fused_vjp(const T* q, const T* k, const T* v, const float* lse, const float* delta, const T* d_o, Call c,
                          int* counts, float* dq_sum, float* dk_sum, float* dv_sum) {
  using X = Backward<D>;
  constexpr int BQ = X::BQ, BK = X::BK, DP = X::DP, QS = X::Q_STAGES, OS = X::DO_STAGES;
  const Pairs<BQ, BK> pairs{c};
  const unsigned k_tile = tiles_begin(), v_tile = k_tile + X::KEY_BYTES, q_tiles = v_tile + X::KEY_BYTES;
  const unsigned do_tiles = q_tiles + QS * X::QUERY_BYTES, ds_tiles = do_tiles + OS * X::QUERY_BYTES;
  const unsigned dq_tile = ds_tiles + 2 * X::DS_BYTES, lse_rows = dq_tile + X::DQ_BYTES;
  const unsigned first_rows = lse_rows + QS * X::ROWS_BYTES, delta_rows = first_rows + QS * X::ROWS_BYTES;
  // Each buffer has barriers that signal that its data is copied or written, is published, or is no longer needed.
  const unsigned k_copied = delta_rows + OS * X::ROWS_BYTES, v_copied = k_copied + 8, q_copied = v_copied + 8;
  const unsigned do_copied = q_copied + 8 * QS, k_here = do_copied + 8 * OS, v_here = k_here + 8, q_here = v_here + 8;
  const unsigned do_here = q_here + 8 * QS, q_free = do_here + 8 * OS, do_free = q_free + 8 * QS, ds_written = do_free + 8 * OS;
  const unsigned ds_here = ds_written + 8, dq_written = ds_here + 8, dq_free = dq_written + 8, sums_written = dq_free + 8;
  const unsigned ticket_at = sums_written + 8;
  if (threadIdx.x == 0) {
    init_barrier(k_copied, 32), init_barrier(v_copied, 32), init_barrier(k_here, 1), init_barrier(v_here, 1);
    for (int i = 0; i < 8 * QS; i += 8)
      init_barrier(q_copied + i, 32), init_barrier(q_here + i, 1), init_barrier(q_free + i, 8);
    for (int i = 0; i < 8 * OS; i += 8)
      init_barrier(do_copied + i, 32), init_barrier(do_here + i, 1), init_barrier(do_free + i, 8);
    init_barrier(ds_written, 8), init_barrier(ds_here, 1);
    init_barrier(dq_written, 8), init_barrier(dq_free, 1), init_barrier(sums_written, 8);
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(ticket_at), "r"(atomicAdd(counts, 1)) : "memory");
  }
  __syncthreads();
  // The order of the tickets: first some heads of each group with all of their keys, beginning with the first keys
  // (which most queries see with a causal mask), and then the next heads.
  const int ticket = read_shared<int>(ticket_at), share = c.H / c.G, groups = c.B * c.G, key_tiles = pairs.key_tiles();
  int at_once = 1;
  while (share % (2 * at_once) == 0 && at_once * groups * key_tiles < X::AT_ONCE) at_once *= 2;
  const int head = ticket / at_once / groups / key_tiles * at_once + ticket % at_once;
  const int bg = ticket / at_once % groups, key_tile = ticket / at_once / groups % key_tiles, k0 = key_tile * BK;
  const size_t bh = static_cast<size_t>(bg) * share + head;
  const int begin = pairs.queries_begin(key_tile), end = pairs.queries_end(key_tile), steps = max(0, end - begin);

  if (warpgroup() == 0) {
    fewer_registers<X::COPY_REGISTERS>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp == 0) {
      copy_rows<BK, D, 32>(k_tile, k + (static_cast<size_t>(bg) * c.S + k0) * D, c.S - k0, lane);
      arrive_with_copies(k_copied);
      Turn<QS> turn;
      for (int tile = end - 1; tile >= begin; --tile, turn.next()) {
        wait(q_free + 8 * turn.stage, turn.phase ^ 1);
        const size_t row = bh * c.T + tile * BQ;
        const int rows = c.T - tile * BQ;
        copy_rows<BQ, D, 32>(q_tiles + turn.stage * X::QUERY_BYTES, q + row * D, rows, lane);
        copy_numbers<BQ, false>(lse_rows + turn.stage * X::ROWS_BYTES, lse + row, rows, lane);
        copy_numbers<BQ, true>(first_rows + turn.stage * X::ROWS_BYTES, c.first + tile * BQ, rows, lane);
        arrive_with_copies(q_copied + 8 * turn.stage);
      }
      wait_copies();
    } else if (warp == 1) {
      copy_rows<BK, D, 32>(v_tile, v + (static_cast<size_t>(bg) * c.S + k0) * D, c.S - k0, lane);
      arrive_with_copies(v_copied);
      Turn<OS> turn;
      for (int tile = end - 1; tile >= begin; --tile, turn.next()) {
        wait(do_free + 8 * turn.stage, turn.phase ^ 1);
        const size_t row = bh * c.T + tile * BQ;
        const int rows = c.T - tile * BQ;
        copy_rows<BQ, D, 32>(do_tiles + turn.stage * X::QUERY_BYTES, d_o + row * D, rows, lane);
        copy_numbers<BQ, false>(delta_rows + turn.stage * X::ROWS_BYTES, delta + row, rows, lane);
        arrive_with_copies(do_copied + 8 * turn.stage);
      }
      wait_copies();
    } else if (warp == 2 && lane == 0) {
      // dq is summed in the order of the keys. The first block writes its part, and the other blocks add theirs.
      int* count = counts + 1 + bh * pairs.query_tiles();
      float* to = dq_sum + bh * pairs.query_tiles() * (BQ * DP);
      unsigned phase = 0;
      for (int tile = end - 1; tile >= begin; --tile, phase ^= 1) {
        const int turn = key_tile - pairs.keys_begin(tile);
        wait(dq_written, phase);
        wait_for_turn(count + tile, turn);
        publish();
        store_bulk(to + static_cast<size_t>(tile) * (BQ * DP), dq_tile, X::DQ_BYTES, turn > 0);
        end_stores();
        stores_have_read();
        arrive(dq_free);
        stores_done();
        end_turn(count + tile);
      }
      // dk and dv are summed in the order of the heads.
      count = counts + 1 + groups * share * pairs.query_tiles() + bg * key_tiles + key_tile;
      const size_t at = (static_cast<size_t>(bg) * key_tiles + key_tile) * X::SUM_SIZE;
      wait(sums_written, 0);
      wait_for_turn(count, head);
      publish();
      store_bulk(dk_sum + at, k_tile, X::SUM_SIZE * 4, head > 0);
      store_bulk(dv_sum + at, q_tiles, X::SUM_SIZE * 4, head > 0);
      end_stores();
      stores_done();
      end_turn(count);
    } else if (warp == 3 && lane == 0) {
      relay(k_copied, k_here, 0);
      relay(v_copied, v_here, 0);
      Turn<QS> q_turn;
      Turn<OS> do_turn;
      auto relay_queries = [&] {
        relay(q_copied + 8 * q_turn.stage, q_here + 8 * q_turn.stage, q_turn.phase);
        q_turn.next();
      };
      if (steps > 0) relay_queries();
      for (int step = 0; step < steps; ++step, do_turn.next()) {
        relay(do_copied + 8 * do_turn.stage, do_here + 8 * do_turn.stage, do_turn.phase);
        if (step + 1 < steps) relay_queries();
        relay(ds_written, ds_here, step % 2);
      }
    }
    return;
  }

  more_registers<X::REGISTERS>();
  const int group = warpgroup() - 1, key0 = k0 + group * 64;
  const Score<CAP> score(c);
  float s[BQ / 2], dp[BQ / 2], dk[DP / 2], dv[DP / 2];
  unsigned p[BQ / 4], ds[BQ / 4];
#pragma unroll
  for (int i = 0; i < DP / 2; ++i) dk[i] = dv[i] = 0;
  // The matrix products are transposed, with keys as rows. multiply_rows computes to = k·qᵀ or v·doᵀ, and add_rows
  // computes to += a·q or a·do.
  auto multiply_rows = [&](float (&to)[BQ / 2], unsigned keys, unsigned queries) {
    keep(to);
    begin_products();
#pragma unroll
    for (int x = 0; x < DP; x += 16) {
      const auto a = operand(keys + x / 64 * block_bytes(BK) + group * block_bytes(64) + x % 64 * 2);
      const auto b = operand(queries + x / 64 * block_bytes(BQ) + x % 64 * 2);
      if (x == 0) multiply<false, false, T, false>(to, a, b);
      else multiply<false, false, T>(to, a, b);
    }
    end_products();
  };
  auto add_rows = [&](float (&to)[DP / 2], unsigned (&a)[BQ / 4], unsigned queries) {
    keep(a);
    keep(to);
    begin_products();
#pragma unroll
    for (int x = 0; x < BQ; x += 16) multiply<true, T>(to, a + x / 4, operand(queries + x * 128, block_bytes(BQ)));
    end_products();
  };

  wait(k_here, 0);
  wait(v_here, 0);
  keep(dk);
  keep(dv);
  Turn<QS> turn;
  if (steps > 0) {
    wait(q_here, 0);
    multiply_rows(s, k_tile, q_tiles);
    products_done<0>();
    keep(s);
  }
  // The matrix products run one after another without a gap: the product for dP runs while P is computed, the one for
  // dV while dS is computed, and the ones for dK and the next step's S while dQ is written. Waiting for all products
  // allows the compiler to reuse their registers.
  for (int step = 0; step < steps; ++step) {
    const int q0 = (end - 1 - step) * BQ;
    const unsigned stage = step % 2, q_tile = q_tiles + turn.stage * X::QUERY_BYTES;
    const unsigned do_tile = do_tiles + stage * X::QUERY_BYTES, ds_tile = ds_tiles + stage * X::DS_BYTES, col_at = threadIdx.x % 4 * 8;
    wait(do_here + 8 * stage, step / 2 % 2);
    multiply_rows(dp, v_tile, do_tile);

    /// P = exp(S − lse)
    const unsigned lse_at = lse_rows + turn.stage * X::ROWS_BYTES + col_at, first_at = first_rows + turn.stage * X::ROWS_BYTES;
    const bool all = read_shared<int>(first_at + (BQ - 1) * 4) <= key0 && key0 + 64 <= c.q_start + q0 + 1;
    float slopes[CAP ? BQ / 2 : 1];
#pragma unroll
    for (int n = 0; n < BQ / 8; ++n) {
      const float2 of_rows = read_floats(lse_at + n * 32);
      const float lse_r[2] = {of_rows.x * LOG2E, of_rows.y * LOG2E};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s[n * 4 + i];
        const float y = score(x);
        if constexpr (CAP) slopes[n * 4 + i] = score.slope(y);
        x = exp2_of(y - lse_r[i % 2]);
      }
    }
    if (!all) {
#pragma unroll
      for (int n = 0; n < BQ / 8; ++n) {
        const uint2 firsts = read_shared<uint2>(first_at + col_at + n * 32);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = key0 + result_row(i / 2), query = q0 + result_col(n) + i % 2;
          if (key < static_cast<int>(i % 2 ? firsts.y : firsts.x) || key > c.q_start + query) s[n * 4 + i] = 0;
        }
      }
    }
    // P, multiplied by the slope of the softcap, is kept for dS in half precision, because there are not enough
    // registers to keep it in float32.
    unsigned short_p[BQ / 4];
#pragma unroll
    for (int i = 0; i < BQ / 4; ++i) {
      p[i] = pack2<T>(s[i * 2], s[i * 2 + 1]);
      short_p[i] = CAP ? pack2<T>(s[i * 2] * slopes[CAP ? i * 2 : 0], s[i * 2 + 1] * slopes[CAP ? i * 2 + 1 : 0]) : p[i];
    }

    /// dV += Pᵀ·dO, dP = dO·Vᵀ
    add_rows(dv, p, do_tile);
    products_done<(BQ == 64)>();
    keep(dp);

    /// dS = P·(dP − delta)
#pragma unroll
    for (int n = 0; n < BQ / 8; ++n) {
      const float2 delta_r = read_floats(delta_rows + stage * X::ROWS_BYTES + col_at + n * 32);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 y = unpack2<T>(short_p[n * 2 + i]);
        ds[n * 2 + i] = pack2<T>(y.x * (dp[n * 4 + i * 2] - delta_r.x), y.y * (dp[n * 4 + i * 2 + 1] - delta_r.y));
      }
    }
#pragma unroll
    for (int n = 0; n < BQ / 16; ++n) {
      const unsigned block[4] = {ds[n * 4], ds[n * 4 + 1], ds[n * 4 + 2], ds[n * 4 + 3]};
      store_block(ds_tile, group * 64 + threadIdx.x % 128 / 32 * 16, n * 2, block_bytes(BK), block);
    }
    warp_arrives(ds_written);
    wait(ds_here, step % 2);
    products_done<0>();
    keep(dv);
    keep(p);
    warp_arrives(do_free + 8 * stage);

    /// dQ = dS·K of this tile of keys, for half of the columns, or for half of the queries if there are more
    /// of them
    float more[BQ == 128 ? 32 : 1];
    float(&dq)[32] = pick_array<BQ == 128>(more, dp);
    keep(dq);
    begin_products();
#pragma unroll
    for (int x = 0; x < BK; x += 16) {
      const auto a = operand(ds_tile + (BQ == 128 ? group * block_bytes(BK) : 0) + x * 128, block_bytes(BK));
      const auto b = operand(k_tile + (BQ == 128 ? 0 : group * block_bytes(BK)) + x * 128, block_bytes(BK));
      if (x == 0) multiply<true, true, T, false>(dq, a, b);
      else multiply<true, true, T>(dq, a, b);
    }
    end_products();

    /// dK += dSᵀ·Q
    add_rows(dk, ds, q_tile);
    const unsigned q_done = q_free + 8 * turn.stage;
    turn.next();
    if (step + 1 < steps) wait(q_here + 8 * turn.stage, turn.phase);
    multiply_rows(s, k_tile, q_tiles + turn.stage * X::QUERY_BYTES);  // in the last step the result is not used
    products_done<2>();
    keep(dq);
    wait(dq_free, step % 2 ^ 1);
    store_sums(dq_tile, dq);
    warp_arrives(dq_written);
    products_done<0>();
    keep(dk);
    keep(ds);
    keep(s);
    warp_arrives(q_done);
  }
  meet(1, 256);  // after this barrier, no thread reads the tiles
  store_sums(k_tile, dk);
  store_sums(q_tiles, dv);
  warp_arrives(sums_written);
}

// ---- rounding of the sums

/// Writes scale·sum to y [heads, rows, D], or zeros where no block has `added`. A tile has ROWS·DP elements in the
/// order in which store_sums writes them. They come from two groups: with SIDE, each group has half of the columns;
/// otherwise, each has half of the rows. 256 threads process 4096 elements, and each thread processes eight columns of
/// two rows.
template <int ROWS, int D, bool SIDE, typename T, typename Added>
__device__ inline void round_tiles(const float* sum, int rows, float scale, int job, Added added, T* y) {
  constexpr int PIECES = (D + 63) / 64 * 8, PARTS = ROWS * PIECES / 512, OF_GROUP = SIDE ? PIECES / 2 : PIECES;
  const int tiles = (rows + ROWS - 1) / ROWS, tile = job / PARTS % tiles, id = job % PARTS * 256 + threadIdx.x;
  const size_t head = job / PARTS / tiles;
  const int piece = id % PIECES, quad = id / PIECES % 32, group = SIDE ? piece / OF_GROUP : id / PIECES / 32;
  if (piece * 8 >= D) return;
  const float4* from = reinterpret_cast<const float4*>(sum + (head * tiles + tile) * (ROWS * PIECES * 8)) +
                       ((group * OF_GROUP + piece % OF_GROUP) * 32 + quad) * 4;
  float4 x[4] = {};
  if (added(tile))
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = from[i];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = tile * ROWS + (SIDE ? 0 : group * 64) + quad / 8 * 16 + quad % 8 + r * 8;
    unsigned pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = pack2<T>((r ? x[i].z : x[i].x) * scale, (r ? x[i].w : x[i].y) * scale);
    if (row < rows)
      *reinterpret_cast<uint4*>(y + (head * rows + row) * D + piece * 8) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}

template <int D, typename T>
__device__ void round_sums(const float* dq_sum, const float* dk_sum, const float* dv_sum, Call c, T* dq, T* dk, T* dv) {
  using X = Backward<D>;
  const Pairs<X::BQ, X::BK> pairs{c};
  const int of_queries = c.B * c.H * pairs.query_tiles() * (X::BQ * X::DP / 4096);
  const int of_keys = c.B * c.G * pairs.key_tiles() * (X::BK * X::DP / 4096), job = blockIdx.x;
  auto any = [&](int tile) { return pairs.keys_begin(tile) < pairs.keys_end(tile); };
  auto all = [](int) { return true; };
  if (job < of_queries) round_tiles<X::BQ, D, X::BQ == 64>(dq_sum, c.T, c.scale, job, any, dq);
  else if (job < of_queries + of_keys) round_tiles<X::BK, D, false>(dk_sum, c.S, c.scale, job - of_queries, all, dk);
  else round_tiles<X::BK, D, false>(dv_sum, c.S, 1, job - of_queries - of_keys, all, dv);
}

}  // namespace segtrain

// Kernel bodies. The line before each body names the kernel, its inputs and its outputs.
// at = {q_start, -, B, H, G, T, S}, args = {scale, cap}.

//: attention_fused: q k v first at args -> o lse
using X = Forward<D>;
static_assert(ROWS == X::BQ && THREADS == X::THREADS && SHARED_BYTES == X::BYTES);
attention_fused<D, CAP>(q, k, v, make_call(first, at, args), o, lse);
//: attention_fused_begin: o d_o first at args -> delta counts
begin_vjp<D>(o, d_o, make_call(first, at, args), delta, counts);
//: attention_fused_vjp: q k v lse delta d_o first at args counts -> dq_sum dk_sum dv_sum
using X = Backward<D>;
static_assert(ROWS == X::BQ && THREADS == X::THREADS && SHARED_BYTES == X::BYTES);
fused_vjp<D, CAP>(q, k, v, lse, delta, d_o, make_call(first, at, args), const_cast<int*>(counts), dq_sum, dk_sum, dv_sum);
//: attention_fused_round: dq_sum dk_sum dv_sum first at args -> dq dk dv
round_sums<D>(dq_sum, dk_sum, dv_sum, make_call(first, at, args), dq, dk, dv);
