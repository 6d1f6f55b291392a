# CMake settings for macOS on arm64. They describe the compiler, because CMake's own check would link a program, for
# which zig would first have to build a C++ library.
set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_PROCESSOR arm64)
set(CMAKE_CXX_COMPILER "$ENV{MAC_BIN}/c++")
set(CMAKE_AR "$ENV{MAC_BIN}/ar")
set(CMAKE_RANLIB "$ENV{MAC_BIN}/ranlib")
set(CMAKE_INSTALL_NAME_TOOL true)
set(CMAKE_CXX_COMPILER_ID AppleClang)
set(CMAKE_CXX_COMPILER_VERSION 16)
set(CMAKE_CXX_COMPILER_ID_RUN TRUE)
set(CMAKE_CXX_COMPILER_FORCED TRUE)
set(CMAKE_CXX_STANDARD_COMPUTED_DEFAULT 17)
set(CMAKE_CXX_EXTENSIONS_COMPUTED_DEFAULT ON)
set(CMAKE_CXX_COMPILE_FEATURES cxx_std_11 cxx_std_14 cxx_std_17 cxx_std_20)
set(CMAKE_OSX_SYSROOT "$ENV{MAC_BIN}")
# Availability attributes cause a warning for each call that needs a newer macOS version than the oldest one that we
# support.
set(CMAKE_CXX_FLAGS_INIT -Werror)
