// Computes the inputs of rotary embeddings, for all ops that apply them.
#pragma once

#include "core/kernel.h"

namespace segtrain {

/// Returns the positions of n tokens, the first of which has the index `offset`. Positions restart in each
/// segment. The position of a token outside all segments is its index.
std::vector<int32_t> positions_of(int offset, int n, const Ranges& segments);

/// Returns the numbers by which positions are divided: `freqs` or, if `base` is given, base^(2i / dims) in an
/// array that all layers share.
mx::array device_divisors(int dims, std::optional<float> base, const std::optional<mx::array>& freqs,
                          mx::StreamOrDevice s);

}  // namespace segtrain
