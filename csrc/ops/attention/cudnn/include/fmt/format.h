// A stub of the fmt library for mlx/backend/cuda/lru_cache.h, which includes this header. Only code that is
// compiled into MLX itself calls the library.
#pragma once

#include <string>

namespace fmt {

template <class... Parts>
std::string format(const Parts&... parts);

}  // namespace fmt
