// Splits the work of our kernels on Metal into short launches: macOS ends a program whose work on the GPU
// keeps the display waiting.
#pragma once

#include "ops/attention/attention.h"

namespace segtrain {

/// The number of keys of a threadgroup, and the size of a block of scores with as many queries and keys; the
/// same as in metal/attention.metal.
constexpr int METAL_ROWS = 32, SCORE_BLOCK = METAL_ROWS * METAL_ROWS;

/// The number of queries of a threadgroup, in the forward pass and for dQ. Ranges begin at multiples of it.
constexpr int metal_forward_rows(int D) {
  return D <= 64 ? 64 : 32;
}
constexpr int metal_vjp_rows(int D) {
  return D <= 64 ? 128 : D <= 128 ? 64 : 32;
}

/// The number of matrix products per block of scores in a launch of each kernel; metal/attention.metal.
constexpr int FORWARD_PRODUCTS = 2, DKV_PRODUCTS = 4;

/// The maximum bytes of dS, over all heads, that a launch may write to memory.
constexpr int64_t SCORE_BYTES = 128 << 20;

/// The predicted seconds on an M1 for a plain causal call with this many products; docs/performance.md.
double causal_seconds(const Call& c, int products);

/// A lower bound of this GPU's speed relative to an M1; 1 without a GPU.
double m1s_of_gpu();

/// Ranges of queries that cover the call. Each takes at most 0.3 s on an M1, or is as short as possible (one
/// threadgroup's queries). In the backward pass each also has at most SCORE_BYTES of dS.
Ranges forward_parts(const Call& c);
Ranges vjp_parts(const Call& c);

/// The non-empty blocks of scores of one head. The blocks of a tile of keys are consecutive: block index[i] +
/// j has the keys from 32 i on and the queries from 32 j on. `index` has at least 8 elements.
struct ScoreBlocks {
  std::vector<int32_t> index;
  int count = 0;
};
ScoreBlocks score_blocks(const Call& c);

/// The dtype in which dS is written to memory. It is float32 for float16, in which small gradients would
/// underflow.
mx::Dtype metal_score_dtype(mx::Dtype dtype);

/// The maximum bytes that the backward pass needs besides its inputs and outputs.
int64_t metal_vjp_scratch(const Call& c);

/// The range of keys that these queries see; it begins at a multiple of METAL_ROWS and is not empty.
std::pair<int, int> keys_of_queries(const Call& c, std::pair<int, int> queries);

/// The call restricted to some queries, to some keys (which must include all keys that are seen), or to some
/// groups.
Call of_queries(const Call& c, std::pair<int, int> part);
Call of_keys(const Call& c, std::pair<int, int> part);
Call of_groups(const Call& c, int groups);

}  // namespace segtrain
