// What rotates, for ops that rotate as part of more.
#pragma once

#include "core/kernel.h"

namespace segtrain {

/// Of tokens from `offset` on, in their segments; what is in none of them counts on.
std::vector<int32_t> positions_of(int offset, int n, const Ranges& segments);

/// The divisors of positions: base^(2i / dims), of which a GPU has one array for all layers, or `freqs`.
mx::array device_divisors(int dims, std::optional<float> base, const std::optional<mx::array>& freqs,
                          mx::StreamOrDevice s);

}  // namespace segtrain
