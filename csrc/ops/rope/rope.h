// Inputs of rotary embeddings, for ops that include one.
#pragma once

#include "core/kernel.h"

namespace segtrain {

/// The positions of n tokens from `offset` on. They count from the start of each segment; a token outside all
/// segments has its index as its position.
std::vector<int32_t> positions_of(int offset, int n, const Ranges& segments);

/// The divisors of positions: `freqs`, or base^(2i / dims) in an array that all layers share.
mx::array device_divisors(int dims, std::optional<float> base, const std::optional<mx::array>& freqs,
                          mx::StreamOrDevice s);

}  // namespace segtrain
