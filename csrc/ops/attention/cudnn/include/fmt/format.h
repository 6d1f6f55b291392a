// Stands in for the fmt library: mlx/backend/cuda/lru_cache.h names it in code that only MLX itself compiles.
#pragma once

#include <string>

namespace fmt {

template <class... Parts>
std::string format(const Parts&... parts);

}  // namespace fmt
