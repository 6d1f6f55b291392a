// Replaces the fmt library, which mlx/backend/cuda/lru_cache.h uses in code that only MLX itself compiles.
#pragma once

#include <string>

namespace fmt {

template <class... Parts>
std::string format(const Parts&... parts);

}  // namespace fmt
