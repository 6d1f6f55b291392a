// Replaces the fmt library. mlx/backend/cuda/lru_cache.h includes it, but only MLX compiles code that calls
// it.
#pragma once

#include <string>

namespace fmt {

template <class... Parts>
std::string format(const Parts&... parts);

}  // namespace fmt
