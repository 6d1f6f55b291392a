// How our kernels' work on Metal is cut into launches, none of which takes long: macOS ends a program whose
// work on the GPU does not let the display have its turn.
#pragma once

#include "ops/attention/attention.h"

namespace segtrain {

/// Keys that a group of threads owns; blocks of scores have as many keys and queries. metal/attention.metal
constexpr int METAL_ROWS = 32, SCORE_BLOCK = METAL_ROWS * METAL_ROWS;

/// Queries that a group of threads owns, of the forward pass and of dQ: parts begin at multiples of them.
constexpr int metal_forward_rows(int D) {
  return D <= 64 ? 64 : 32;
}
constexpr int metal_vjp_rows(int D) {
  return D <= 64 ? 128 : D <= 128 ? 64 : 32;
}

/// Products of a block of scores with rows of D numbers, in a launch of each kernel; metal/attention.metal.
constexpr int FORWARD_PRODUCTS = 2, DKV_PRODUCTS = 4;

/// Bytes of dS that a launch may write down, of all its heads.
constexpr int64_t SCORE_BYTES = 128 << 20;

/// Seconds that so many products of a plain causal call take on an M1: predicted, docs/performance.md.
double causal_seconds(const Call& c, int products);

/// How many M1 this machine's GPU makes up for at least; 1 where there is none.
double m1s_of_gpu();

/// Ranges of queries that cover the call and take at most 0.3 s each on an M1, or are one group's. In the
/// backward pass each has at most SCORE_BYTES of dS as well.
Ranges forward_parts(const Call& c);
Ranges vjp_parts(const Call& c);

/// The blocks of scores of one head that are not empty: those of a tile of keys follow each other, and
/// index[i] + j is that of the queries from 32 j on. At least 8 numbers.
struct ScoreBlocks {
  std::vector<int32_t> index;
  int count = 0;
};
ScoreBlocks score_blocks(const Call& c);

/// The dtype that dS is written in: a half's range ends where shares of small gradients begin.
mx::Dtype metal_score_dtype(mx::Dtype dtype);

/// Bytes that the backward pass takes at most besides what it reads and gives.
int64_t metal_vjp_scratch(const Call& c);

/// Keys that some queries see, from a multiple of METAL_ROWS on; at least one.
std::pair<int, int> keys_of_queries(const Call& c, std::pair<int, int> queries);

/// The call of some of its queries; of some of its keys, which all queries see that see any; of some groups.
Call of_queries(const Call& c, std::pair<int, int> part);
Call of_keys(const Call& c, std::pair<int, int> part);
Call of_groups(const Call& c, int groups);

}  // namespace segtrain
