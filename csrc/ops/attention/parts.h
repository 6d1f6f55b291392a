// Divides the work of our Metal kernels into short launches, because macOS terminates a program whose GPU
// work blocks the display for too long.
#pragma once

#include "ops/attention/attention.h"

namespace segtrain {

/// METAL_ROWS is the number of keys per threadgroup. SCORE_BLOCK is the number of scores in a block of
/// METAL_ROWS queries × METAL_ROWS keys. Both must have the same values as in metal/attention.metal.
constexpr int METAL_ROWS = 32, SCORE_BLOCK = METAL_ROWS * METAL_ROWS;

/// Returns the number of queries per threadgroup in the forward pass and for dQ. Ranges begin at multiples of
/// this number.
constexpr int metal_forward_rows(int D) {
  return D <= 64 ? 64 : 32;
}
constexpr int metal_vjp_rows(int D) {
  return D <= 64 ? 128 : D <= 128 ? 64 : 32;
}

/// The number of matrix products per block of scores in a launch of each kernel; see metal/attention.metal.
constexpr int FORWARD_PRODUCTS = 2, DKV_PRODUCTS = 4;

/// The maximum number of bytes of dS, over all heads, that a launch may write to memory.
constexpr int64_t SCORE_BYTES = 128 << 20;

/// Returns the predicted seconds on an M1 for a plain causal call with `products` matrix products per block
/// of scores; see docs/performance.md.
double causal_seconds(const Call& c, int products);

/// Returns a lower bound on this GPU's speed relative to an M1, or 1 if there is no GPU.
double m1s_of_gpu();

/// Return ranges of queries that together cover the call. The predicted time of a range on an M1 is at most
/// 0.3 s, unless the range is already as short as possible, with the queries of a single threadgroup. In the
/// backward pass, the dS of a range also needs at most SCORE_BYTES.
Ranges forward_parts(const Call& c);
Ranges vjp_parts(const Call& c);

/// The non-empty blocks of scores of one head. The blocks of one key tile are consecutive: block index[i] + j
/// covers the 32 keys that begin at 32 i and the 32 queries that begin at 32 j. `index` has at least 8
/// elements.
struct ScoreBlocks {
  std::vector<int32_t> index;
  int count = 0;
};
ScoreBlocks score_blocks(const Call& c);

/// Returns the dtype in which dS is written to memory. For float16 calls it is float32, because small
/// gradients would underflow in float16.
mx::Dtype metal_score_dtype(mx::Dtype dtype);

/// Returns the maximum number of bytes that the backward pass needs in addition to its inputs and outputs.
int64_t metal_vjp_scratch(const Call& c);

/// Returns the range of keys that these queries see. It begins at a multiple of METAL_ROWS and is not empty.
std::pair<int, int> keys_of_queries(const Call& c, std::pair<int, int> queries);

/// Return the call restricted to some queries, keys or groups. The keys must include all keys that the call's
/// queries see.
Call of_queries(const Call& c, std::pair<int, int> part);
Call of_keys(const Call& c, std::pair<int, int> part);
Call of_groups(const Call& c, int groups);

}  // namespace segtrain
