// How our kernels' work on Metal is cut into launches, none of which takes long: macOS ends a program whose
// work on the GPU does not let the display have its turn.
#pragma once

#include "ops/attention/attention.h"

namespace segtrain {

/// Rows that a group of threads owns: parts begin at multiples of it.
constexpr int METAL_ROWS = 32;

/// Products of a block of scores with rows of D numbers, in a launch of each kernel; metal/attention.metal.
constexpr int FORWARD_PRODUCTS = 2, DQ_PRODUCTS = 3, DKV_PRODUCTS = 4;

/// Seconds that so many products of a plain causal call take on an M1: predicted, docs/performance.md.
double causal_seconds(const Call& c, int products);

/// How many M1 this machine's GPU makes up for at least; 1 where there is none.
double m1s_of_gpu();

/// Ranges of queries, or of keys, that cover the call and take at most 0.3 s each on an M1, or are one
/// group's.
Ranges query_parts(const Call& c, int products);
Ranges key_parts(const Call& c, int products);

/// The call of some of its queries; of some of its keys, which may lie after a query's position.
Call of_queries(const Call& c, std::pair<int, int> part);
Call of_keys(const Call& c, std::pair<int, int> part);

}  // namespace segtrain
