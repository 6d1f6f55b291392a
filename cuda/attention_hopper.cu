// Attention with Hopper's warpgroup matrix multiplications (wgmma). See docs/attention.md, "hopper";
// csrc/ops/attention/hopper.cpp launches these kernels.
//
// The shapes are those in attention.cu; b, g and h are indices into batch, key/value heads and query heads.
// attention_hopper uses one block per (64 queries, b, h). Each of the block's two warpgroups computes S for half of the
// keys of a tile, and half of the columns of O. They exchange P through shared memory.
//
// The backward pass processes a limited range of queries at a time, in three steps over a scratch array of 16-bit
// tiles: attention_scores_vjp writes P and dS, attention_keys_vjp sums dK and dV, and attention_queries_vjp sums dQ.
// Each step multiplies whole tiles, and only one block writes each output. This needs five matrix products per pair of
// tiles for any head size, whereas a kernel that keeps P and dS in registers needs seven. In exchange, P and dS are
// written to memory once.
//
// A chain of launches writes scratch and sums in place, although MLX treats these arrays as inputs. If each range
// allocated new scratch arrays, memory use would grow to the size of all of P, because MLX frees the arrays of a graph
// only when the graph is done. Additional inputs order the chain: a kernel that reads or overwrites scratch or sums
// receives one output of each launch that must finish first. A launch without other outputs has the output `done`.

namespace segtrain {

// ---- copies of tiles

/// Copies x [rows, cols] to the tile [ROWS, 64·BLOCKS], with 256 threads, and fills the rest of the tile with zeros.
/// `my_row` is the row of x that the thread copies first: threadIdx.x / 8, or another row if the rows are permuted.
template <int ROWS, int BLOCKS, typename T>
__device__ inline void copy_tile(unsigned tile, const T* x, int ld, int rows, int cols, int my_row) {
  const int row = threadIdx.x / 8, piece = threadIdx.x % 8;
  tile += row * 128 + ((piece ^ row % 8) << 4);
  x += static_cast<ptrdiff_t>(my_row) * ld + piece * 8;
#pragma unroll
  for (int r = 0; r < ROWS; r += 32)
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block)
      copy_async<16>(tile + block * block_bytes(ROWS) + r * 128, x + r * ld + block * 64,
                     my_row + r < rows && piece * 8 + block * 64 < cols);
}
__device__ inline int copy_row() { return threadIdx.x / 8; }

__device__ inline void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits for all groups of copies except the last AHEAD groups, and makes the copied data visible to all threads and to
/// the tensor cores.
template <int AHEAD>
__device__ inline void copies_here() {
  asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD) : "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
}

/// A ring buffer of tiles in shared memory. While the matrix products of a step run, the data of the following steps is
/// copied. `load(address)` starts the copies for the next step; after the last step it does nothing. A stage is
/// overwritten once the products that read it are done in every warpgroup. With DRAIN, each step waits for its own
/// products (blocks on the same multiprocessor use the gaps); otherwise it waits for the products of the previous step.
template <int STAGES, int STAGE_BYTES, bool DRAIN>
struct Ring {
  static constexpr int AHEAD = DRAIN ? STAGES - 1 : STAGES - 2, BYTES = STAGES * STAGE_BYTES;
  static_assert(AHEAD >= 1);
  unsigned begin;
  int read = 0, write = 0;

  template <typename Load>
  __device__ void copy(Load& load) {
    load(begin + write * STAGE_BYTES);
    end_copies();
    if (++write == STAGES) write = 0;
  }
  template <typename Load>
  __device__ void fill(Load& load) {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) copy(load);
  }
  /// Runs products(address) for the next step, with the accumulators c.
  template <typename Load, typename Products, int N>
  __device__ void step(Load& load, Products products, float (&c)[N]) {
    copies_here<AHEAD - 1>();
    keep(c);
    begin_products();
    products(begin + read * STAGE_BYTES);
    end_products();
    if (++read == STAGES) read = 0;
    copy(load);
    products_done<DRAIN ? 0 : 1>();
  }
};

// ---- o, lse

/// The layout of shared memory: the queries, P, a ring buffer of keys and values, and the data that the two warpgroups
/// exchange.
template <int D>
struct ForwardTiles {
  static constexpr int BQ = 64, BK = 128, DP = (D + 127) / 128 * 128;
  using Tiles = Ring<4, BK * 128 * 2, false>;
  static constexpr int BYTES = BQ * DP * 2 + BQ * BK * 2 + Tiles::BYTES + 2 * BQ * 4 + ALIGN;
};

/// Keys are read in tiles of 128. A step copies 128 columns of k, or a quarter of the rows of v; for D = 512, S and O
/// need four steps each.
template <int D, int DV, bool CAP, typename T>
__device__ void attention_hopper(const T* q, const T* k, const T* v, Call c, T* o, float* lse) {
  using X = ForwardTiles<D>;
  constexpr int BQ = X::BQ, BK = X::BK, DP = X::DP, COLS = (DV + 127) / 128 * 64, KEY_STEPS = DP / 128;
  constexpr int STEPS = KEY_STEPS + 4;
  static_assert(32 * 2 * COLS * 2 <= BK * 128 * 2);
  const QueryTile t(c, BQ);
  const Score<CAP> score(c);
  const unsigned q_tile = tiles_begin(), p_tile = q_tile + BQ * DP * 2;
  typename X::Tiles ring{p_tile + BQ * BK * 2};
  float* shared = reinterpret_cast<float*>(shared_tiles<char>() + (ring.begin + ring.BYTES - shared_address(shared_tiles<char>())));
  int load_k0 = t.k_begin, load_part = 0;
  auto load = [&](unsigned to) {
    if (load_k0 >= t.k_end) return;
    const size_t row = t.bg * c.S + load_k0;
    if (load_part < KEY_STEPS) {
      const int x = load_part * 128;
      copy_tile<BK, 2>(to, k + row * D + x, D, c.S - load_k0, D - x, copy_row());
    } else {
      const int y = (load_part - KEY_STEPS) * 32;
      copy_tile<32, 2 * COLS / 64>(to, v + (row + y) * DV, DV, c.S - load_k0 - y, DV, copy_row());
    }
    if (++load_part == STEPS) load_part = 0, load_k0 += BK;
  };
  copy_tile<BQ, DP / 64>(q_tile, q + (t.bh * c.T + t.q0) * D, D, t.rows, D, copy_row());
  ring.fill(load);

  float sum[COLS / 2] = {}, m[2] = {-infinity(), -infinity()}, l[2] = {};
  for (int tile_k0 = t.k_begin; tile_k0 < t.k_end; tile_k0 += BK) {
    const int k0 = tile_k0 + warpgroup() * 64;

    /// S = scale·q·kᵀ, capped
    float s[32] = {};
    for (int part = 0; part < KEY_STEPS; ++part)
      ring.step(load, [&](unsigned tile) {
#pragma unroll
        for (int x = 0; x < 128; x += 16)
          multiply<false, false, T>(s, operand(q_tile + (part * 2 + x / 64) * block_bytes(BQ) + x % 64 * 2),
                                    operand(tile + x / 64 * block_bytes(BK) + warpgroup() * 64 * 128 + x % 64 * 2));
      }, s);
    products_done<0>();
    keep(s);
    const bool all = c.all_seen(t.q0, t.q0 + BQ, k0, k0 + 64);
    float top[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = t.q0 + result_row(r), begin = all ? 0 : c.first_of(query) - k0, end = all ? 64 : c.q_start + query - k0;
      top[r] = -infinity();
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& y = s[n * 4 + r * 2 + e];
          const int key = result_col(n) + e;
          y = begin <= key && key <= end ? score(y) : -infinity();
          top[r] = fmaxf(top[r], y);
        }
      top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 2));
      if (threadIdx.x % 4 == 0) shared[warpgroup() * BQ + result_row(r)] = top[r];
    }
    __syncthreads();

    /// Online softmax: rescales the sums, which are relative to the old maximum.
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float both = fmaxf(m[r], fmaxf(top[r], shared[(1 - warpgroup()) * BQ + result_row(r)]));
      const float base = both == -infinity() ? 0 : both, shrink = exp2_of(m[r] - base);
      m[r] = both;
      l[r] *= shrink;
#pragma unroll
      for (int n = 0; n < COLS / 8; ++n) sum[n * 4 + r * 2] *= shrink, sum[n * 4 + r * 2 + 1] *= shrink;
      const int row = result_row(r);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float x = exp2_of(s[n * 4 + r * 2] - base), y = exp2_of(s[n * 4 + r * 2 + 1] - base);
        l[r] += x + y;
        const unsigned to = p_tile + warpgroup() * block_bytes(BQ) + row * 128 + ((n ^ row % 8) << 4) + threadIdx.x % 4 * 4;
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(pack2<T>(x, y)) : "memory");
      }
    }
    // The next step's wait also makes P visible to the tensor cores, because its fence and barrier precede the matrix
    // products.

    /// O += P·V
    for (int part = 0; part < 4; ++part)
      ring.step(load, [&](unsigned tile) {
#pragma unroll
        for (int x = 0; x < 32; x += 16)
          multiply<false, true, T>(sum, operand(p_tile + part / 2 * block_bytes(BQ) + (part % 2 * 32 + x) * 2),
                                   operand(tile + warpgroup() * (COLS / 64) * block_bytes(32) + x * 128, block_bytes(32)));
      }, sum);
    products_done<0>();
    keep(sum);
  }

  /// O/l, lse = m + log l
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    l[r] += __shfl_xor_sync(~0u, l[r], 1);
    l[r] += __shfl_xor_sync(~0u, l[r], 2);
    if (threadIdx.x % 4 == 0) shared[warpgroup() * BQ + result_row(r)] = l[r];
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = result_row(r);
    if (row >= t.rows) continue;
    const float total = shared[row] + shared[BQ + row], inverse = total > 0 ? 1 / total : 0;
    const size_t at = t.bh * c.T + t.q0 + row;
    if (warpgroup() == 0 && threadIdx.x % 4 == 0) lse[at] = total > 0 ? m[r] * LN2 + logf(total) : -infinity();
#pragma unroll
    for (int n = 0; n < COLS / 8; ++n) {
      const int col = warpgroup() * COLS + result_col(n);
      if (col < DV)
        *reinterpret_cast<unsigned*>(o + at * DV + col) = pack2<T>(sum[n * 4 + r * 2] * inverse, sum[n * 4 + r * 2 + 1] * inverse);
    }
  }
}

// ---- backward pass: code that is common to the three steps

constexpr int TILE = 128, TILE_SIZE = TILE * TILE;  // number of queries and of keys in a tile of P and dS

/// The query tiles [tile, tile + tiles) of the heads in groups [group, group + groups). Each query tile sees at most
/// `width` key tiles.
struct Range {
  int group, groups, tile, tiles, width;
  bool first;  ///< this is the first range of its groups, so it initializes the sums
};
__device__ inline Range make_range(const int* at) { return {at[7], at[8], at[9], at[10], at[11], at[12] != 0}; }

/// A thread's elements of a row of P are pairs, eight columns apart. This function maps between their order and another
/// order, in which four such pairs are sixteen consecutive bytes. It is its own inverse.
__device__ inline int swap_pairs(int x) { return x & ~30 | (x >> 1 & 3) << 3 | (x >> 3 & 3) << 1; }

struct KeyTiles {
  int begin, end;
  __device__ KeyTiles(const Call& c, int tile) {
    begin = c.first_of(tile * TILE) / TILE;
    end = (c.q_start + min(c.T, (tile + 1) * TILE) + TILE - 1) / TILE;
  }
};

// ---- p, ds

/// One block computes one tile. Two blocks run on a multiprocessor, so that the matrix products of one block run while
/// the other block writes.
template <int D, int DV, bool CAP, typename T>
__device__ void scores_vjp(const T* q, const T* k, const T* v, const float* lse, const float* delta, const T* d_o, Call c,
                           Range h, T* p, T* ds) {
  constexpr int KEY_STEPS = (D + 63) / 64, STEPS = KEY_STEPS + (DV + 63) / 64, HALF = TILE * 128;
  const int head = blockIdx.x / h.width / h.tiles, tile = h.tile + blockIdx.x / h.width % h.tiles;
  const int share = c.H / c.G, q0 = tile * TILE;
  const KeyTiles keys(c, tile);
  // For every query tile, the slot of a key tile is the index of the key tile modulo the width.
  const int slot = blockIdx.x % h.width, behind = slot - keys.begin % h.width;
  const int k0 = (keys.begin + behind + (behind < 0 ? h.width : 0)) * TILE;
  if (k0 >= keys.end * TILE) return;
  const size_t bg = h.group + head / share, bh = bg * share + head % share;
  const Score<CAP> score(c);
  q += (bh * c.T + q0) * D, d_o += (bh * c.T + q0) * DV;
  k += (bg * c.S + k0) * D, v += (bg * c.S + k0) * DV;

  Ring<3, 2 * HALF, true> ring{tiles_begin()};
  int load_step = 0;
  auto load = [&](unsigned to) {
    if (load_step < KEY_STEPS) {
      const int x = load_step * 64;
      copy_tile<TILE, 1>(to, q + x, D, c.T - q0, D - x, copy_row());
      copy_tile<TILE, 1>(to + HALF, k + x, D, c.S - k0, D - x, copy_row());
    } else if (load_step < STEPS) {
      const int x = (load_step - KEY_STEPS) * 64;
      copy_tile<TILE, 1>(to, d_o + x, DV, c.T - q0, DV - x, copy_row());
      copy_tile<TILE, 1>(to + HALF, v + x, DV, c.S - k0, DV - x, copy_row());
    }
    ++load_step;
  };
  auto sum = [&](float (&to)[64], int steps) {
#pragma unroll 1
    for (int step = 0; step < steps; ++step)
      ring.step(load, [&](unsigned at) {
#pragma unroll
        for (int x = 0; x < 64; x += 16)
          multiply<false, false, T>(to, operand(at + warpgroup() * 64 * 128 + x * 2), operand(at + HALF + x * 2));
      }, to);
    keep(to);
  };
  ring.fill(load);

  T* out[2] = {p + blockIdx.x * static_cast<size_t>(TILE_SIZE), ds + blockIdx.x * static_cast<size_t>(TILE_SIZE)};
  auto write = [&](T* to, const unsigned (&pairs)[32]) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        *reinterpret_cast<uint4*>(to + (warpgroup() * 64 + result_row(r)) * TILE + i * 32 + threadIdx.x % 4 * 8) =
            make_uint4(pairs[i * 8 + r], pairs[i * 8 + 2 + r], pairs[i * 8 + 4 + r], pairs[i * 8 + 6 + r]);
  };

  /// P = exp(S − lse)
  unsigned pairs[32], slopes[CAP ? 32 : 1];
  float delta_r[2];
  {
    float s[64] = {};
    sum(s, KEY_STEPS);
    int begin[2], end[2];
    float lse_r[2];
    const bool all = q0 + TILE <= c.T && c.all_seen(q0, q0 + TILE, k0, k0 + TILE);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = q0 + warpgroup() * 64 + result_row(r);
      const size_t row = bh * c.T + min(query, c.T - 1);
      begin[r] = all ? 0 : c.first_of(query) - k0, end[r] = all ? TILE : query < c.T ? c.q_start + query - k0 : -1;
      lse_r[r] = lse[row] * LOG2E, delta_r[r] = delta[row];
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int r = i % 2;
      float y[2], slope[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = result_col(i / 2) + e;
        const float x = score(s[i * 2 + e]);
        slope[e] = score.slope(x);
        y[e] = begin[r] <= key && key <= end[r] ? exp2_of(x - lse_r[r]) : 0;
      }
      pairs[i] = pack2<T>(y[0], y[1]);
      if constexpr (CAP) slopes[i] = pack2<T>(slope[0], slope[1]);
    }
  }
  write(out[0], pairs);

  /// dP = dO·Vᵀ, dS = P·(dP − delta)
  float dp[64] = {};
  sum(dp, STEPS - KEY_STEPS);
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    float2 y = unpack2<T>(pairs[i]);
    if constexpr (CAP) {
      const float2 slope = unpack2<T>(slopes[i]);
      y.x *= slope.x, y.y *= slope.y;
    }
    pairs[i] = pack2<T>(y.x * (dp[i * 2] - delta_r[i % 2]), y.y * (dp[i * 2 + 1] - delta_r[i % 2]));
  }
  write(out[1], pairs);
}

// ---- dk, dv

/// The columns that one block sums: all columns of a head, or an equal part of them.
template <int D, int MOST>
struct Columns {
  static constexpr int DP = (D + 63) / 64 * 64, BLOCKS = (DP + MOST - 1) / MOST, N = (DP / 64 + BLOCKS - 1) / BLOCKS * 64;
  static constexpr int A_BYTES = 64 * TILE * 2, B_BYTES = 64 * N * 2;
  using Tiles = Ring<(N > 128 ? 4 : 3), A_BYTES + B_BYTES, (N <= 128)>;
};

/// One block per (tile of keys, b, g, part of D) adds scale·aᵀ·x, over the range's queries and the group's heads, to
/// sum [B,G,S,D]. For the first range, it overwrites the sum. a and x are P and dO, or dS and Q.
template <int D, int MOST, typename T>
__device__ void keys_vjp(const T* a, const T* x, Call c, Range h, int job, float scale, float* sum) {
  using X = Columns<D, MOST>;
  constexpr int N = X::N;
  const int key_tiles = (c.S + TILE - 1) / TILE, share = c.H / c.G;
  const int key_tile = job % key_tiles, group = job / key_tiles % h.groups, col = job / key_tiles / h.groups * N;
  const int k0 = key_tile * TILE;
  // The query tiles of the range that see this key tile are contiguous.
  const int begin = max(h.tile, max(0, k0 - c.q_start) / TILE);
  const int end = min(h.tile + h.tiles, (queries_before(c, k0 + TILE) + TILE - 1) / TILE);
  const int tiles = begin < end && key_tile < KeyTiles(c, end - 1).end ? end - begin : 0;
  if (tiles == 0 && !h.first) return;
  const int steps = max(1, share * tiles * 2);  // if no query sees it, one step adds zeros
  const size_t bg = h.group + group;

  typename X::Tiles ring{tiles_begin()};
  a += key_tile % h.width * TILE_SIZE, x += col;
  int head = 0, tile = begin, half = 0;
  auto load = [&](unsigned to) {
    if (head >= share) return;
    const size_t at = static_cast<size_t>((group * share + head) * h.tiles + tile - h.tile) * h.width;
    copy_tile<64, 2>(to, a + at * TILE_SIZE + half * TILE, TILE, tiles ? 64 : 0, TILE, copy_row());
    const int q0 = tile * TILE + half;
    copy_tile<64, N / 64>(to + X::A_BYTES, x + ((bg * share + head) * c.T + q0) * D, D, c.T - q0, D - col, copy_row());
    half ^= 64;
    if (half == 0 && ++tile >= end) tile = begin, ++head;
  };
  ring.fill(load);
  float y[N / 2] = {};
  int step = 0;
  do ring.step(load, [&](unsigned at) {
#pragma unroll
      for (int i = 0; i < 64; i += 16)
        multiply<true, true, T>(y, operand(at + warpgroup() * block_bytes(64) + i * 128, block_bytes(64)),
                                operand(at + X::A_BYTES + i * 128, block_bytes(64)));
    }, y);
  while (++step < steps);
  products_done<0>();
  keep(y);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int key = k0 + swap_pairs(warpgroup() * 64 + result_row(r));
    if (key >= c.S) continue;
    float* to = sum + (bg * c.S + key) * D + col;
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
      if (col + result_col(n) >= D) continue;
      float2& pair = *reinterpret_cast<float2*>(to + result_col(n));
      const float2 old = h.first ? make_float2(0, 0) : pair;
      pair = make_float2(old.x + scale * y[n * 4 + r * 2], old.y + scale * y[n * 4 + r * 2 + 1]);
    }
  }
}

/// Computes dV += Pᵀ·dO and dK += scale·dSᵀ·Q, in different blocks of the same launch.
template <int D, int DV, int MOST, typename T>
__device__ void keys_vjp(const T* p, const T* ds, const T* q, const T* d_o, Call c, Range h, float* dk, float* dv) {
  const int jobs = (c.S + TILE - 1) / TILE * h.groups * Columns<D, MOST>::BLOCKS;
  if (blockIdx.x < jobs) keys_vjp<D, MOST>(ds, q, c, h, blockIdx.x, c.scale, dk);
  else keys_vjp<DV, MOST>(p, d_o, c, h, blockIdx.x - jobs, 1, dv);
}

// ---- dq

/// One block per (tile of queries, b, h, part of D) computes dq = scale·dS·K for the range's queries.
template <int D, int MOST, typename T>
__device__ void queries_vjp(const T* ds, const T* k, Call c, Range h, T* dq) {
  using X = Columns<D, MOST>;
  constexpr int N = X::N;
  const int row = blockIdx.x / X::BLOCKS, col = blockIdx.x % X::BLOCKS * N;
  const int head = row / h.tiles, tile = h.tile + row % h.tiles, q0 = tile * TILE;
  const KeyTiles keys(c, tile);
  const int tiles = max(0, keys.end - keys.begin), steps = max(1, tiles * 2);  // if no key is seen, one step adds zeros
  k += static_cast<size_t>(h.group + head / (c.H / c.G)) * c.S * D + col;
  ds += static_cast<size_t>(row) * h.width * TILE_SIZE;

  typename X::Tiles ring{tiles_begin()};
  int key_tile = keys.begin, half = 0;
  auto load = [&](unsigned to) {
    if (key_tile >= keys.end && tiles > 0) return;
    copy_tile<TILE, 1>(to, ds + key_tile % h.width * TILE_SIZE + half, TILE, tiles ? TILE : 0, 64, copy_row());
    const int k0 = key_tile * TILE + half;
    copy_tile<64, N / 64>(to + X::A_BYTES, k + static_cast<size_t>(k0) * D, D, c.S - k0, D - col, swap_pairs(copy_row()));
    half ^= 64;
    if (half == 0) ++key_tile;
  };
  ring.fill(load);
  float y[N / 2] = {};
  int step = 0;
  do ring.step(load, [&](unsigned at) {
#pragma unroll
      for (int i = 0; i < 64; i += 16)
        multiply<false, true, T>(y, operand(at + warpgroup() * 64 * 128 + i * 2),
                                 operand(at + X::A_BYTES + i * 128, block_bytes(64)));
    }, y);
  while (++step < steps);
  products_done<0>();
  keep(y);
  const int rows = min(c.T, (h.tile + h.tiles) * TILE) - h.tile * TILE;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = q0 - h.tile * TILE + warpgroup() * 64 + result_row(r);
    if (query >= rows) continue;
    T* to = dq + (static_cast<size_t>(head) * rows + query) * D + col;
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
      if (col + result_col(n) < D)
        *reinterpret_cast<unsigned*>(to + result_col(n)) = pack2<T>(y[n * 4 + r * 2] * c.scale, y[n * 4 + r * 2 + 1] * c.scale);
  }
}

}  // namespace segtrain

// Kernel bodies. The line before each body names the kernel, its inputs and its outputs.
// at = {q_start, -, B, H, G, T, S, group, groups, tile, tiles, width, first}, args = {scale, cap}.

//: attention_hopper: q k v first at args -> o lse
static_assert(THREADS == 256 && SHARED_BYTES == ForwardTiles<D>::BYTES);
attention_hopper<D, DV, CAP>(q, k, v, make_call(first, at, args), o, lse);
//: attention_row_dot: o d_o at -> delta p ds dk_sum dv_sum
row_dot(o, d_o, at[2] * at[3] * at[5], DV, delta);
//: attention_scores_vjp: q k v lse delta d_o first at args p ds keys_done queries_done -> done
static_assert(THREADS == 256 && SHARED_BYTES == Ring<3, 2 * TILE * 128, true>::BYTES + ALIGN);
scores_vjp<D, DV, CAP>(q, k, v, lse, delta, d_o, make_call(first, at, args), make_range(at),
                                 const_cast<T*>(p), const_cast<T*>(ds));
//: attention_keys_vjp: p ds q d_o first at args dk_sum dv_sum scores_done -> done
using K = Columns<D, MOST>;
using V = Columns<DV, MOST>;
constexpr int BYTES = (K::Tiles::BYTES > V::Tiles::BYTES ? K::Tiles::BYTES : V::Tiles::BYTES) + ALIGN;
static_assert(THREADS == 256 && SHARED_BYTES == BYTES && BLOCKS == K::BLOCKS + V::BLOCKS);
keys_vjp<D, DV, MOST>(p, ds, q, d_o, make_call(first, at, args), make_range(at),
                          const_cast<float*>(dk_sum), const_cast<float*>(dv_sum));
if (blockIdx.x == 0 && threadIdx.x == 0) *done = 0;
//: attention_queries_vjp: ds k first at args scores_done -> dq
using X = Columns<D, MOST>;
static_assert(THREADS == 256 && SHARED_BYTES == X::Tiles::BYTES + ALIGN && BLOCKS == X::BLOCKS);
queries_vjp<D, MOST>(ds, k, make_call(first, at, args), make_range(at), dq);
