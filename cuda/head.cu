// Computes the losses of m rows and their gradients, one tile of the vocabulary at a time. csrc/ops/head/head.cpp
// explains the algorithm. The CPU code, csrc/ops/head/cpu.cpp, computes whole rows.
//
// The rows' state is float32 [3, m]: the maximum of the logits z so far, Σ exp(z − max) over all tokens except the
// target, and the target's z.

namespace segtrain {

constexpr int HEAD_THREADS = 256;

/// Computes one row per thread block. z [m, v] are the logits of v tokens, the first of which is v0, before the bias
/// [v] is added. The results are p = exp(z − max)·dz/dlogit [m, v], which is 0 at the target, and rescale [m], the
/// factor for the earlier sums.
template <int PACKS, bool CAP, bool BIAS, typename T>
__device__ void head_tile(const T* z, const float* bias, const int* targets, const float* before, int m, int v, int v0, float cap,
                          T* p, float* state, float* rescale) {
  const size_t row = blockIdx.x, begin = row * v;
  const int target = targets[row] - v0;
  Pack<T> mine[PACKS];
  float most = -infinity();
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
    const int col = (k * HEAD_THREADS + threadIdx.x) * 8;
    if (col >= v) break;
    mine[k] = *reinterpret_cast<const Pack<T>*>(z + begin + col);
#pragma unroll
    for (int i = 0; i < 8; ++i) most = fmaxf(most, to_float(mine[k].x[i]) + (BIAS ? bias[col + i] : 0));
  }
  // The softcap is monotonic, so the largest z is also largest after the softcap.
  auto capped = [&](float x) { return CAP ? cap * tanh_of(x / cap) : x; };
  const float max_before = before[row], max_now = fmaxf(max_before, capped(block_reduce<true>(most)));
  float sum = 0;
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
    const int col = (k * HEAD_THREADS + threadIdx.x) * 8;
    if (col >= v) break;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float y = capped(to_float(mine[k].x[i]) + (BIAS ? bias[col + i] : 0));
      float e = exp2_of((y - max_now) * LOG2E);
      if (col + i == target) {
        state[2 * m + row] = y;
        e = 0;
      }
      sum += e;
      put(mine[k].x[i], CAP ? e * (1 - (y / cap) * (y / cap)) : e);
    }
    *reinterpret_cast<Pack<T>*>(p + begin + col) = mine[k];
  }
  sum = block_reduce<false>(sum);
  if (threadIdx.x) return;
  const float scale = exp2_of((max_before - max_now) * LOG2E);
  state[row] = max_now;
  state[m + row] = before[m + row] * scale + sum;
  if (target < 0 || target >= v) state[2 * m + row] = before[2 * m + row];
  rescale[row] = scale;
}

/// Computes sum [m, h] = before·rescale + more, where h is the width of the model.
template <typename T>
__device__ void head_sum(const float* before, const T* more, const float* rescale, size_t n, int h, float* sum) {
  const size_t i = (static_cast<size_t>(blockIdx.x) * HEAD_THREADS + threadIdx.x) * 8;
  if (i >= n) return;
  const float scale = rescale[i / h];
  const Pack<T> x = *reinterpret_cast<const Pack<T>*>(more + i);
  Pack<float> y = *reinterpret_cast<const Pack<float>*>(before + i);
#pragma unroll
  for (int j = 0; j < 8; ++j) y.x[j] = y.x[j] * scale + to_float(x.x[j]);
  *reinterpret_cast<Pack<float>*>(sum + i) = y;
}

/// Computes the loss lse − z[target] of each row without subtracting two large numbers.
template <typename T>
__device__ void head_loss(const float* state, const int* targets, int m, int vocabulary, float* loss) {
  const int row = blockIdx.x * HEAD_THREADS + threadIdx.x;
  if (row >= m) return;
  const float others = state[m + row], ahead = state[row] - state[2 * m + row], own = exp2_of(-ahead * LOG2E);
  loss[row] = targets[row] < 0 ? 0 : targets[row] >= vocabulary ? infinity() - infinity()
              : ahead > 0 ? ahead + logf(others + own) : log1pf(others);
}

/// Computes dh of each row's loss: (Σ p·w)/s − (1 − p[target])·(dz/dlogit)[target]·w[target]. Here s is Σ exp(z − max)
/// over all tokens, and w [m, h] contains the rows of the head's weight for the targets.
template <bool CAP, typename T>
__device__ void head_dh(const float* sum, const float* state, const int* targets, const T* w, int m, int h, int vocabulary,
                        float cap, T* dh) {
  const size_t row = blockIdx.x;
  const float others = state[m + row], z = state[2 * m + row], all = others + exp2_of((z - state[row]) * LOG2E);
  const bool live = targets[row] >= 0;
  const float nan = targets[row] >= vocabulary ? infinity() - infinity() : 0;
  const float scale = live ? 1 / all + nan : 0, own = live ? others / all * (CAP ? 1 - (z / cap) * (z / cap) : 1) : 0;
  for (int i = threadIdx.x * 8; i < h; i += HEAD_THREADS * 8) {
    const Pack<float> x = *reinterpret_cast<const Pack<float>*>(sum + row * h + i);
    const Pack<T> target = *reinterpret_cast<const Pack<T>*>(w + row * h + i);
    Pack<T> y;
#pragma unroll
    for (int j = 0; j < 8; ++j) put(y.x[j], x.x[j] * scale - own * to_float(target.x[j]));
    *reinterpret_cast<Pack<T>*>(dh + row * h + i) = y;
  }
}

}  // namespace segtrain

// Kernel bodies. The line before each body names the kernel, its inputs and its outputs.
// at = {m, tokens of the tile, its first token, h, vocabulary}, args = {cap}.

//: head_tile: z bias targets before at args -> p state rescale
head_tile<PACKS, CAP, BIAS>(z, bias, targets, before, at[0], at[1], at[2], args[0], p, state, rescale);
//: head_sum: before more rescale at -> sum
head_sum(before, more, rescale, static_cast<size_t>(at[0]) * at[3], at[3], sum);
//: head_loss: state targets at -> loss
head_loss<float>(state, targets, at[0], at[4], loss);
//: head_dh: sum state targets w at args -> dh
head_dh<CAP>(sum, state, targets, w, at[0], at[3], at[4], args[0], dh);
