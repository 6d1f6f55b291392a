"""Faults that a build for Linux does not find. `make mac` plants each of them and must find it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """A fault that replaces `old` in a file with `new`. The pattern `says` must match the
    compiler's message."""

    what: str
    file: str
    old: str
    new: str
    says: str


@dataclass(frozen=True)
class Symbol:
    """A fault that links an additional file, or removes a part of the linker's command."""

    what: str
    source: str
    says: str
    without: str = ""


THREADS, KERNEL = "csrc/cpu/threads.cpp", "csrc/core/kernel.cpp"
HOST = [
    Text("glibc header", KERNEL, "#ifdef __linux__\n", "#if 1\n", "'malloc.h' file not found"),
    Text(
        "Linux-only processor count", THREADS,
        "#ifdef __linux__\n    cpu_set_t", "#if 1\n    cpu_set_t",
        "unknown type name 'cpu_set_t'",
    ),
    Text(
        "Linux signature of pthread_setname_np",
        THREADS,
        "int n_threads() {\n",
        '#include <pthread.h>\nint n_threads() {\n  pthread_setname_np(pthread_self(), "own");\n',
        "no matching function for call to 'pthread_setname_np'",
    ),
    Text(
        "Linux-only gettid",
        THREADS,
        "int n_threads() {\n",
        "#include <unistd.h>\nint n_threads() {\n  (void)gettid();\n",
        "undeclared identifier 'gettid'",
    ),
    Text(
        "Linux-only dlopen flag", "csrc/core/cuda_compiler.cpp",
        "RTLD_LAZY | RTLD_LOCAL", "RTLD_LAZY | RTLD_DEEPBIND",
        "undeclared identifier 'RTLD_DEEPBIND'",
    ),
    Text(
        "Linux-only secure_getenv",
        THREADS,
        'std::getenv("MLX_SEGTRAIN_THREADS")',
        'secure_getenv("MLX_SEGTRAIN_THREADS")',
        "undeclared identifier 'secure_getenv'",
    ),
    Text(
        "long instead of int64_t", "csrc/schedule/planner.cpp", "namespace segtrain {\n",
        "namespace segtrain {\nlong longer(long x, int64_t y) { return std::max(x, y); }\n",
        "no matching function for call to 'max'",
    ),
    Text(
        "parallel algorithms", "csrc/schedule/plan.cpp", "#include <algorithm>\n",
        "#include <algorithm>\n#include <execution>\n#include <vector>\n"
        "void sort(std::vector<int>& x) { std::sort(std::execution::par, x.begin(), x.end()); }\n",
        "no member named 'par'|no member named 'execution'",
    ),
    Text(
        "one auto for two types", "csrc/ops/head/linear_cross_entropy.cpp",
        "        const float* weights = in[in.size() - 1];\n        float* dh =",
        "        auto weights = in[in.size() - 1],\n             dh =",
        "'auto' deduced as 'const float \\*' in declaration of 'weights'",
    ),
    Text(
        "x86 intrinsics", "csrc/cpu/rows.cpp", "#include", "#include <immintrin.h>\n#include",
        "only meant to be used on x86",
    ),
    Text(
        "loop that is not vectorized", "csrc/cpu/rows.cpp",
        "  for (; i < n; ++i) m = x[i] > m ? x[i] : m;\n",
        "#pragma omp simd reduction(max : m)\n"
        "  for (int j = i; j < n; ++j) m = x[j] > m ? x[j] : m;\n",
        "loop not vectorized",
    ),
    Text(
        "function newer than macOS 14.0", THREADS, "int n_threads() {\n",
        '}\n#include <string.h>\nnamespace segtrain::cpu {\nint n_threads() {\n'
        '  (void)strchrnul("a", 97);\n',
        "'strchrnul' is only available on macOS 15.4",
    ),
]  # fmt: skip

SYMBOLS = [
    Symbol(
        "function of MLX's CUDA backend",
        "namespace mlx::core::cu { void* device(int); }\n"
        "void* own() { return mlx::core::cu::device(0); }\n",
        "undefined symbol: __ZN3mlx4core2cu6deviceEi",
    ),
    Symbol(
        "wrong signature of an MLX function",
        "namespace mlx::core { class array; void tanh(const array&); }\n"
        "void own(const mlx::core::array& x) { mlx::core::tanh(x); }\n",
        "undefined symbol: __ZN3mlx4core4tanhERKNS0_5arrayE",
    ),
    Symbol(
        "private CPython function",
        'extern "C" int _Py_PrintReferences();\nint own() { return _Py_PrintReferences(); }\n',
        "undefined symbol: __Py_PrintReferences",
    ),
    Symbol(
        "glibc function",
        'extern "C" int malloc_trim(unsigned long);\nint own() { return malloc_trim(0); }\n',
        "undefined symbol: _malloc_trim",
    ),
    Symbol(
        "C++ library function newer than macOS 14.0",
        "namespace std { inline namespace __1 {\n"
        "unsigned long __hash_memory(const void*, unsigned long); } }\n"
        "unsigned long own(const char* x) { return std::__hash_memory(x, 1); }\n",
        "undefined symbol: __ZNSt3__113__hash_memoryEPKvm",
    ),
    Symbol(
        "function of GCC's C++ library",
        "namespace std { void __throw_bad_alloc(); }\nvoid own() { std::__throw_bad_alloc(); }\n",
        "undefined symbol: __ZSt17__throw_bad_allocv",
    ),
    Symbol(
        "matrix product of OpenBLAS",
        'extern "C" void scipy_cblas_sgemm();\nvoid own() { scipy_cblas_sgemm(); }\n',
        "undefined symbol: _scipy_cblas_sgemm",
    ),
    Symbol(
        "loops for x86",
        "namespace segtrain::cpu { struct Rows; extern const Rows rows_avx2; }\n"
        "const void* own() { return &segtrain::cpu::rows_avx2; }\n",
        "undefined symbol: __ZN8segtrain3cpu9rows_avx2E",
    ),
    Symbol(
        "missing source files",
        "",
        "undefined symbol: __ZN8segtrain8describe",
        "CMakeFiles/_core.dir/Unity/unity_group_schedule_cxx.cxx.o",
    ),
    Symbol(
        "missing library",
        "",
        r"undefined symbol: _cblas_sgemm\$NEWLAPACK",
        "-framework Accelerate",
    ),
    Symbol(
        "function defined in two files",
        "namespace segtrain { int dry_run() { return 0; } }\n",
        "duplicate symbol definition: __ZN8segtrain7dry_runEv",
    ),
    Symbol(
        "CUDA driver function",
        'extern "C" int cuInit(unsigned);\nint own() { return cuInit(0); }\n',
        "undefined symbol: _cuInit",
    ),
]

#: Faults in the text of a kernel; `file` is the kernel's name.
METAL = [
    Text(
        "threadgroup pointer used as device pointer", "attention",
        "threadgroup T* k_tile = tiles;", "device T* k_tile = tiles;",
        "cannot initialize a variable of type '(__global|device|__attribute__)",
    ),
    Text(
        "pointer without an address space", "attention",
        "void store(device T* to,", "void store(T* to,",
        "'T\\* to' names no address space",
    ),
    Text(
        "reference without an address space", "attention", "thread float& slope", "float& slope",
        "'float& slope' names no address space",
    ),
    Text(
        "device parameter for a constant argument", "glu",
        "void glu(In gate,", "void glu(const device T* gate,",
        "no matching function for call to 'glu'",
    ),
    Text(
        "write to constant memory", "softmax_rows", "tops[simd] = simd_top;",
        "tops[simd] = simd_top; first[0] = 1;",
        "cannot assign to variable|read-only|const-qualified",
    ),
    Text(
        "threadgroup memory outside of a kernel", "attention",
        "threadgroup T* v_tile = tiles + Tile<T, D>::size;",
        "threadgroup T v_tile[Tile<T, D>::size];",
        "is declared outside of a kernel",
    ),
    Text(
        "threadgroup array of unknown size", "attention",
        "threadgroup T tiles[2 * segtrain::Tile<T, D>::size];", "threadgroup T tiles[q_shape[0]];",
        "not an integral constant expression|variable length|not a constant expression",
    ),
    Text(
        "too much threadgroup memory", "attention",
        "threadgroup T tiles[2 * segtrain::Tile<T, D>::size];",
        "threadgroup T tiles[4 * segtrain::Tile<T, D>::size];", "too much threadgroup memory",
    ),
    Text(
        "misaligned threadgroup memory", "attention",
        "threadgroup T tiles[2 * segtrain::Tile<T, D>::size];",
        "threadgroup T tiles[2 * segtrain::Tile<T, D>::size + 1];", "out of alignment",
    ),
    Text(
        "threadgroup size unlike the host's", "attention", "int SIMDS = 4;", "int SIMDS = 8;",
        "the host launches groups of another size",
    ),
    Text(
        "double", "attention", "l[r] > 0 ? 1 / l[r] : 0, at", "l[r] > 0 ? 1.0 / l[r] : 0.0, at",
        "implicit conversion (increases floating-point precision|loses floating-point precision)",
    ),
    Text(
        "implicit conversion of float to bfloat", "glu", "y[i] = T(g * at.s * float(up[i]));",
        "y[i] = g * at.s * float(up[i]);", "no viable overloaded '='|implicit conversion loses",
    ),
    Text(
        "min of int and uint", "attention", "min(row[r], q1 - 1)", "min(row[r], uint(q1 - 1))",
        "call to 'min' is ambiguous",
    ),
    Text(
        "matrix of integers", "attention", "simdgroup_matrix<float, 8, 8>",
        "simdgroup_matrix<int, 8, 8>", "of half, bfloat or float",
    ),
    Text(
        "matrix of size 16 x 8", "attention", "simdgroup_matrix<float, 8, 8>",
        "simdgroup_matrix<float, 16, 8>", "a matrix is 8 x 8",
    ),
    Text(
        "64-bit shuffle", "attention", "simd_shuffle_xor(x, ushort(1))",
        "simd_shuffle_xor(size_t(x), ushort(1))", "call to 'simd_shuffle_xor' is ambiguous",
    ),
    Text(
        "global variable without an address space", "attention",
        "constant constexpr int SIMDS = 4;", "int other = 32;\nconstant constexpr int SIMDS = 4;",
        "is a variable outside of constant memory",
    ),
    Text(
        "unknown function", "glu", "fast::exp", "fast::expm1", "no member named 'expm1'",
    ),
    Text(
        "name that MLX's text uses", "softmax_rows", "namespace segtrain {",
        "struct complex64_t {};\nnamespace segtrain {", "conflicts with type alias",
    ),
]  # fmt: skip
