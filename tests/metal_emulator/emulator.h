// Implements in C++20 the part of the Metal Shading Language that the kernels use. See
// docs/metal_on_linux.md.
//
// A thread is a fiber. A simdgroup runs until all of its lanes wait; then the next simdgroup runs. This
// exaggerates the effect of a missing barrier. Each kernel runs with several orders of simdgroups, because
// either of two simdgroups could be the one that should have waited. Device and threadgroup memory is
// accessed through checked pointers. Each kernel is compiled with this header; machine.cpp does not depend on
// the kernel and is compiled once.
//
// glibc's hardening, which Ubuntu's compilers enable by default, treats a jump between fibers as an attack.
#undef _FORTIFY_SOURCE
// macOS declares the fiber functions only with _XOPEN_SOURCE, which hides all other extensions unless
// _DARWIN_C_SOURCE is defined.
#ifdef __APPLE__
#define _XOPEN_SOURCE 600
#define _DARWIN_C_SOURCE
#endif
#include <setjmp.h>
#include <stddef.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <limits>
#include <source_location>
#include <string>
#include <type_traits>
#include <vector>

using uint = unsigned;
using ushort = unsigned short;
using uchar = unsigned char;
using ulong = unsigned long;
using half = _Float16;
using float16_t = half;
constexpr half operator""h(long double x) {
  return static_cast<half>(x);
}

namespace emu {
extern int64_t conversions;  ///< conversions of bfloat to float or back
}

/// As in Metal, conversion of a float to a bfloat must be explicit.
struct bfloat {
  uint16_t bits;
  bfloat() = default;
  explicit bfloat(float x) {
    ++emu::conversions;
    auto u = std::bit_cast<uint32_t>(x);
    bits = std::isnan(x) ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
  operator float() const {
    ++emu::conversions;
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
};
using bfloat16_t = bfloat;

namespace metal {

template <typename T, int N>
struct vec_fields;
template <typename T>
struct vec_fields<T, 2> {
  T x, y;
};
template <typename T>
struct vec_fields<T, 3> {
  T x, y, z;
};
template <typename T>
struct vec_fields<T, 4> {
  T x, y, z, w;
};

template <typename T, int N>
struct vec : vec_fields<T, N> {
  vec() = default;
  explicit vec(T all) {
    for (int i = 0; i < N; ++i) (*this)[i] = all;
  }
  template <typename... U>
    requires(sizeof...(U) == N && N > 1)
  vec(U... each) : vec_fields<T, N>{static_cast<T>(each)...} {}
  template <typename U>
  explicit vec(vec<U, N> other) {
    for (int i = 0; i < N; ++i) (*this)[i] = static_cast<T>(other[i]);
  }
  T& operator[](int i) { return reinterpret_cast<T*>(this)[i]; }
  const T& operator[](int i) const { return reinterpret_cast<const T*>(this)[i]; }
};

#define EMU_VEC_OP(op)                                            \
  template <typename T, int N>                                    \
  vec<T, N> operator op(vec<T, N> a, vec<T, N> b) {               \
    for (int i = 0; i < N; ++i) a[i] = T(a[i] op b[i]);           \
    return a;                                                     \
  }                                                               \
  template <typename T, int N>                                    \
  vec<T, N> operator op(vec<T, N> a, std::type_identity_t<T> b) { \
    return a op vec<T, N>(b);                                     \
  }                                                               \
  template <typename T, int N>                                    \
  vec<T, N>& operator op## = (vec<T, N> & a, vec<T, N> b) {       \
    return a = a op b;                                            \
  }
EMU_VEC_OP(+)
EMU_VEC_OP(-)
EMU_VEC_OP(*)
EMU_VEC_OP(/)
#undef EMU_VEC_OP

enum class mem_flags : unsigned { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(unsigned(a) | unsigned(b));
}

}  // namespace metal

#define EMU_VEC(T)               \
  using T##2 = metal::vec<T, 2>; \
  using T##3 = metal::vec<T, 3>; \
  using T##4 = metal::vec<T, 4>;
EMU_VEC(float)
EMU_VEC(half)
EMU_VEC(bfloat)
EMU_VEC(int)
EMU_VEC(uint)
EMU_VEC(short)
EMU_VEC(ushort)
EMU_VEC(ulong)
#undef EMU_VEC

namespace emu {

// ---- threads

constexpr int LANES = 32;
constexpr size_t SHARED_LIMIT = 32768, STACK = 128 << 10;
using Where = std::source_location;

/// The attributes of a thread. MLX passes only the attributes whose names occur in the body.
struct Attributes {
  uint dispatch_quadgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup;
  uint3 dispatch_threads_per_threadgroup, grid_origin, grid_size;
  uint quadgroup_index_in_threadgroup, quadgroups_per_threadgroup, simdgroup_index_in_threadgroup;
  uint simdgroups_per_threadgroup, thread_execution_width, thread_index_in_quadgroup,
      thread_index_in_simdgroup;
  uint thread_index_in_threadgroup;
  uint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid,
      threadgroups_per_grid;
  uint3 threads_per_grid;
  uint threads_per_simdgroup;
  uint3 threads_per_threadgroup;
};

enum class State { READY, IN_SIMD, AT_BARRIER, RETURNED };

struct Fiber {
  Attributes at;
  ucontext_t start;
  jmp_buf here;
  bool started;
  State state;
  const char* op;
  int line;
  int index, simd;
  int thread;                  ///< index in the whole grid, from 1
  uint32_t epoch, simd_epoch;  ///< number of barriers that the thread has passed
};

/// The lanes of a simdgroup that have reached a collective operation.
struct Simd {
  const void* in[LANES];
  void* out[LANES];
  int lanes, arrived;
};

/// One access to threadgroup memory.
struct Touch {
  int index = -1;
  uint32_t epoch = 0, simd_epoch = 0;
};

struct Shadow {
  Touch write, reads[2];  ///< the last two different readers
};

struct Block {
  enum Kind { INPUT, OUTPUT, SHARED } kind;
  std::string name;
  char* data;
  size_t size;
  std::vector<int> writers;    ///< OUTPUT: thread that wrote each byte
  std::vector<Shadow> shadow;  ///< SHARED: for every 2 bytes
  std::vector<char> storage;   ///< SHARED
};

/// The work of a launch. The byte counts include every read and write, even those that a cache would avoid,
/// except reads from constant memory.
struct Counts {
  int64_t products;                                                            ///< products of 8 × 8 matrices
  int64_t device_read, device_written, threadgroup_read, threadgroup_written;  ///< bytes
  int64_t device_accesses, threadgroup_reads, threadgroup_writes;              ///< accesses, each by one lane
  int64_t barriers;                                                            ///< barriers for a whole threadgroup
  int64_t functions;    ///< exp, log, tanh and similar functions, each by one lane
  int64_t conversions;  ///< conversions of bfloat to float or back, each by one lane
};

struct Machine {
  Counts counts;
  std::vector<Fiber> fibers;
  std::vector<Simd> simds;
  std::deque<Block> blocks;  ///< memory of the launch's arguments
  std::deque<Block> shared;
  Fiber* self;
  jmp_buf scheduler;
  void (*kernel)();
  std::string error;
};
extern Machine machine;
inline Fiber& self() {
  return *machine.self;
}

[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);
/// Suspends the running fiber and resumes another one.
void wait(State state, const char* op, int line);

/// Collects a value from every lane. `combine(in, out, lanes)` computes the result of every lane.
template <typename R, typename V, typename F>
R collective(const char* op, V value, F combine, Where where) {
  Fiber& f = self();
  Simd& s = machine.simds[f.simd];
  const int lane = f.at.thread_index_in_simdgroup, line = where.line();
  R result;
  s.in[lane] = &value, s.out[lane] = &result;
  if (++s.arrived < s.lanes) {
    wait(State::IN_SIMD, op, line);
    return result;
  }
  Fiber* first = &machine.fibers[f.simd * LANES];
  for (Fiber* g = first; g < first + s.lanes; ++g)
    if (g != &f && (g->line != line || strcmp(g->op, op)))
      fail("simdgroup has diverged: lane %d is in %s (line %d), lane %d in %s (line %d)", lane, op, line,
           g->index % LANES, g->op, g->line);
  combine(reinterpret_cast<const V* const*>(s.in), reinterpret_cast<R* const*>(s.out), s.lanes);
  s.arrived = 0;
  for (Fiber* g = first; g < first + s.lanes; ++g) g->state = State::READY;
  return result;
}

// ---- memory

/// Counts a memory access by the running fiber, and fails if the access is not allowed.
void touch(Block& b, ptrdiff_t at, size_t bytes, bool write);

struct Device {};
struct Constant {};
struct Threadgroup {};

template <typename T>
struct ref {
  Block* block;
  ptrdiff_t at;
  operator T() const {
    touch(*block, at, sizeof(T), false);
    T x;
    memcpy(&x, block->data + at, sizeof(T));
    return x;
  }
  const ref& operator=(T x) const {
    touch(*block, at, sizeof(T), true);
    memcpy(block->data + at, &x, sizeof(T));
    return *this;
  }
  const ref& operator=(const ref& other) const { return *this = T(other); }
  const ref& operator+=(T x) const { return *this = T(T(*this) + x); }
  const ref& operator-=(T x) const { return *this = T(T(*this) - x); }
  const ref& operator*=(T x) const { return *this = T(T(*this) * x); }
};

/// The type of an expression after its value has been read.
template <typename T>
struct read {
  using type = T;
};
template <typename T>
struct read<ref<T>> {
  using type = T;
};
template <typename T>
using Value = typename read<T>::type;

/// A pointer in an address space. If T is const, the memory may only be read.
template <typename T, typename Space>
struct ptr;

template <typename T, typename Space>
struct ptr<const T, Space> {
  static constexpr ptrdiff_t BYTES = sizeof(T);
  Block* block = nullptr;
  ptrdiff_t at = 0;

  ptr() = default;
  ptr(Block* b, ptrdiff_t a) : block(b), at(a) {}
  template <typename U>
    requires(!std::is_same_v<std::remove_const_t<U>, T>)
  explicit ptr(ptr<U, Space> p) : block(p.block), at(p.at) {
    if (at % ptrdiff_t(alignof(T)) || at % std::min<ptrdiff_t>(BYTES, 16))
      fail("%s is cast to a misaligned pointer", block->name.c_str());
  }
  T operator[](ptrdiff_t i) const {
    const ref<T> element{block, at + i * BYTES};
    if constexpr (!std::is_same_v<Space, Constant>) return element;
    const Counts counts = machine.counts;  // reads of constant memory are not counted
    const T x = element;
    machine.counts = counts;
    return x;
  }
  T operator*() const { return (*this)[0]; }
  const T* operator->() const { return reinterpret_cast<const T*>(block->data + at); }
  ptr operator+(ptrdiff_t n) const { return {block, at + n * BYTES}; }
  ptr operator-(ptrdiff_t n) const { return {block, at - n * BYTES}; }
  ptrdiff_t operator-(ptr other) const { return (at - other.at) / BYTES; }
  ptr& operator+=(ptrdiff_t n) { return *this = *this + n; }
  ptr& operator-=(ptrdiff_t n) { return *this = *this - n; }
  ptr& operator++() { return *this += 1; }
  auto operator<=>(const ptr&) const = default;
};

/// Derived from ptr<const T, Space>, so that, as in C++, a `T*` can be passed to a template whose parameter is
/// a `const T*`.
template <typename T, typename Space>
struct ptr : ptr<const T, Space> {
  using Base = ptr<const T, Space>;
  using Base::Base, Base::operator-, Base::block, Base::at, Base::BYTES;
  ref<T> operator[](ptrdiff_t i) const { return {block, at + i * BYTES}; }
  ref<T> operator*() const { return (*this)[0]; }
  ptr operator+(ptrdiff_t n) const { return {block, at + n * BYTES}; }
  ptr operator-(ptrdiff_t n) const { return {block, at - n * BYTES}; }
  ptr& operator+=(ptrdiff_t n) { return *this = *this + n; }
  ptr& operator-=(ptrdiff_t n) { return *this = *this - n; }
  ptr& operator++() { return *this += 1; }
};

/// Returns the memory block with this name, which all threads of the threadgroup share.
Block& shared_block(const char* name, size_t bytes);

/// Implements `threadgroup T name[N]` in a kernel body.
template <typename T, size_t N>
ptr<T, Threadgroup> shared(const char* name) {
  return {&shared_block(name, N * sizeof(T)), 0};
}

// ---- the grid

struct Launch {
  int grid[3], threadgroup[3];
  int order;  ///< order of simdgroups and lanes: 0 is ascending, 1 is descending, and other values are random seeds
};

/// An argument of a launch, as passed by Python.
struct Argument {
  const char* name;
  char* data;
  size_t size, element;
  int output;
};

/// Runs a launch. Returns null, or an error message.
const char* launch(void (*kernel)(), const Argument* args, int n, const Launch& at);

/// Returns the memory block of the launch's argument i.
Block* block(int i);

/// Returns a memory block that kernels may read until the process ends.
Block* constants(const char* name, void* data, size_t size);

/// Returns a pointer to shapes or strides, which the launch passes by value.
template <typename T, T... values>
ptr<const T, Constant> numbers() {
  static T list[] = {values...};
  static Block& block = *constants("shape or strides", list, sizeof list);
  return {&block, 0};
}

}  // namespace emu

namespace metal {

// ---- simdgroups. A read from a lane that does not exist returns the reader's own value.

#define EMU_WHERE emu::Where where = emu::Where::current()

inline void threadgroup_barrier(mem_flags flags, EMU_WHERE) {
  emu::machine.counts.barriers += emu::self().index == 0;
  emu::wait(emu::State::AT_BARRIER, "threadgroup_barrier", where.line());
  if (unsigned(flags) & unsigned(mem_flags::mem_threadgroup)) ++emu::self().epoch, ++emu::self().simd_epoch;
}

inline void simdgroup_barrier(mem_flags flags, EMU_WHERE) {
  emu::collective<int>("simdgroup_barrier", 0, [](auto, auto, int) {}, where);
  if (unsigned(flags) & unsigned(mem_flags::mem_threadgroup)) ++emu::self().simd_epoch;
}

template <typename T, typename F>
T emu_simd_reduce(const char* op, T x, F f, emu::Where where) {
  return emu::collective<T>(
      op, x,
      [f](auto in, auto out, int lanes) {
        T y = *in[0];
        for (int i = 1; i < lanes; ++i) y = f(y, *in[i]);
        for (int i = 0; i < lanes; ++i) *out[i] = y;
      },
      where);
}

template <typename T, typename V = emu::Value<T>>
V simd_sum(T x, EMU_WHERE) {
  return emu_simd_reduce<V>("simd_sum", x, [](V a, V b) { return V(a + b); }, where);
}
template <typename T, typename V = emu::Value<T>>
V simd_product(T x, EMU_WHERE) {
  return emu_simd_reduce<V>("simd_product", x, [](V a, V b) { return V(a * b); }, where);
}
template <typename T, typename V = emu::Value<T>>
V simd_max(T x, EMU_WHERE) {
  return emu_simd_reduce<V>("simd_max", x, [](V a, V b) { return a < b ? b : a; }, where);
}
template <typename T, typename V = emu::Value<T>>
V simd_min(T x, EMU_WHERE) {
  return emu_simd_reduce<V>("simd_min", x, [](V a, V b) { return b < a ? b : a; }, where);
}
inline bool simd_any(bool x, EMU_WHERE) {
  return emu_simd_reduce("simd_any", x, [](bool a, bool b) { return a || b; }, where);
}
inline bool simd_all(bool x, EMU_WHERE) {
  return emu_simd_reduce("simd_all", x, [](bool a, bool b) { return a && b; }, where);
}

template <typename T>
struct EmuShuffle {
  T value;
  int from;
};
template <typename T>
T emu_shuffle(const char* op, T x, int from, emu::Where where) {
  return emu::collective<T>(
      op, EmuShuffle<T>{x, from},
      [](auto in, auto out, int lanes) {
        for (int i = 0; i < lanes; ++i) {
          const int from = in[i]->from;
          *out[i] = in[from >= 0 && from < lanes ? from : i]->value;
        }
      },
      where);
}
inline int emu_lane() {
  return emu::self().at.thread_index_in_simdgroup;
}

template <typename T, typename V = emu::Value<T>>
V simd_shuffle(T x, ushort lane, EMU_WHERE) {
  return emu_shuffle<V>("simd_shuffle", x, lane, where);
}
template <typename T, typename V = emu::Value<T>>
V simd_shuffle_xor(T x, ushort mask, EMU_WHERE) {
  return emu_shuffle<V>("simd_shuffle_xor", x, emu_lane() ^ mask, where);
}
template <typename T, typename V = emu::Value<T>>
V simd_shuffle_down(T x, ushort delta, EMU_WHERE) {
  return emu_shuffle<V>("simd_shuffle_down", x, emu_lane() + delta, where);
}
template <typename T, typename V = emu::Value<T>>
V simd_shuffle_up(T x, ushort delta, EMU_WHERE) {
  return emu_shuffle<V>("simd_shuffle_up", x, emu_lane() - delta, where);
}
template <typename T, typename V = emu::Value<T>>
V simd_broadcast(T x, ushort lane, EMU_WHERE) {
  return emu_shuffle<V>("simd_broadcast", x, lane, where);
}

// ---- 8 × 8 matrices. Each lane has two neighbouring elements of a row. MLX uses this layout, which was
// measured on the hardware.

inline int emu_row(int lane) {
  return (lane / 4 & 4) + lane / 2 % 4;
}
inline int emu_col(int lane) {
  return (lane / 4 & 2) * 2 + lane % 2 * 2;
}

template <typename T, int Cols, int Rows>
struct simdgroup_matrix {
  static_assert(Cols == 8 && Rows == 8);
  vec<T, 2> elements;
  simdgroup_matrix() {
    const auto conversions = emu::conversions;  // not counted, because T(NAN) is not in the kernel's text
    elements = vec<T, 2>(T(NAN));
    emu::conversions = conversions;
  }
  explicit simdgroup_matrix(T diagonal) {
    const int lane = emu_lane();
    for (int i = 0; i < 2; ++i) elements[i] = emu_row(lane) == emu_col(lane) + i ? diagonal : T(0);
  }
  vec<T, 2>& thread_elements() { return elements; }
  const vec<T, 2>& thread_elements() const { return elements; }
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;

template <typename T, int Cols, int Rows>
simdgroup_matrix<T, Cols, Rows> make_filled_simdgroup_matrix(T x) {
  simdgroup_matrix<T, Cols, Rows> m;
  m.elements = vec<T, 2>(x);
  return m;
}

/// Returns the column and the row in memory of this lane's element i. Fails for a transposed matrix with a
/// nonzero origin, because Metal's manual does not define this case.
inline ulong2 emu_element(int i, ulong2 origin, bool transpose) {
  if (transpose && (origin.x || origin.y))
    emu::fail("a transposed matrix with an origin: move the pointer instead");
  const ulong row = emu_row(emu_lane()), col = emu_col(emu_lane()) + i;
  return transpose ? ulong2(row, col) : ulong2(origin.x + col, origin.y + row);
}

template <typename T, typename U, typename Space>
void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, emu::ptr<U, Space> x, ulong stride = 8,
                    ulong2 origin = ulong2(0), bool transpose = false) {
  static_assert(std::is_same_v<T, std::remove_const_t<U>>, "a matrix must have the type of the memory");
  for (int i = 0; i < 2; ++i) {
    const ulong2 from = emu_element(i, origin, transpose);
    m.elements[i] = x[from.y * stride + from.x];
  }
}

template <typename T, typename Space>
void simdgroup_store(const simdgroup_matrix<T, 8, 8>& m, emu::ptr<T, Space> x, ulong stride = 8,
                     ulong2 origin = ulong2(0), bool transpose = false) {
  for (int i = 0; i < 2; ++i) {
    const ulong2 to = emu_element(i, origin, transpose);
    x[to.y * stride + to.x] = m.elements[i];
  }
}

template <typename A, typename B, typename C>
struct EmuProduct {
  vec<A, 2> a;
  vec<B, 2> b;
  vec<C, 2> c;
};

/// Computes d = a·b + c in float32. The result is rounded to the type of d at the end.
template <typename D, typename A, typename B, typename C>
void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                   const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c,
                                   EMU_WHERE) {
  if (emu::machine.simds[emu::self().simd].lanes != emu::LANES)
    emu::fail("simdgroup_matrix in a simdgroup of fewer than 32 lanes");
  d.elements = emu::collective<vec<D, 2>>(
      "simdgroup_multiply_accumulate", EmuProduct<A, B, C>{a.elements, b.elements, c.elements},
      [](auto in, auto out, int lanes) {
        ++emu::machine.counts.products;
        const auto conversions =
            emu::conversions;  // not counted: the matrix unit itself converts the operands of a product
        float a[8][8], b[8][8], c[8][8];
        for (int l = 0; l < lanes; ++l)
          for (int i = 0; i < 2; ++i) {
            const int row = emu_row(l), col = emu_col(l) + i;
            a[row][col] = float(in[l]->a[i]), b[row][col] = float(in[l]->b[i]),
            c[row][col] = float(in[l]->c[i]);
          }
        for (int i = 0; i < 8; ++i)
          for (int k = 0; k < 8; ++k)
            for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
        for (int l = 0; l < lanes; ++l)
          for (int i = 0; i < 2; ++i) (*out[l])[i] = D(c[emu_row(l)][emu_col(l) + i]);
        emu::conversions = conversions;
      },
      where);
}

template <typename D, typename A, typename B>
void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                        const simdgroup_matrix<B, 8, 8>& b, EMU_WHERE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8, 8>(D(0)), where);
}

// ---- mathematics

#define EMU_MATH(name, expression)                  \
  template <typename T, typename V = emu::Value<T>> \
    requires(!std::is_integral_v<V>)                \
  V name(T value) {                                 \
    const float x = float(V(value));                \
    ++emu::machine.counts.functions;                \
    return V(expression);                           \
  }
#define EMU_MATH_ALL                   \
  EMU_MATH(exp, std::exp(x))           \
  EMU_MATH(exp2, std::exp2(x))         \
  EMU_MATH(log, std::log(x))           \
  EMU_MATH(log2, std::log2(x))         \
  EMU_MATH(tanh, std::tanh(x))         \
  EMU_MATH(sqrt, std::sqrt(x))         \
  EMU_MATH(rsqrt, 1.0f / std::sqrt(x)) \
  EMU_MATH(sin, std::sin(x))           \
  EMU_MATH(cos, std::cos(x))
EMU_MATH_ALL
EMU_MATH(floor, std::floor(x))
EMU_MATH(ceil, std::ceil(x))
EMU_MATH(rint, std::rint(x))
namespace fast {
EMU_MATH_ALL
}
namespace precise {
EMU_MATH_ALL
}

// All arguments must have the same type. In Metal some arguments would be converted implicitly; our kernels
// convert them explicitly.
template <typename T, typename V>
concept Same = std::is_same_v<emu::Value<T>, V>;

template <typename T, typename V = emu::Value<T>>
V min(T x, Same<V> auto y) {
  const V a = x, b = y;
  return b < a ? b : a;
}
template <typename T, typename V = emu::Value<T>>
V max(T x, Same<V> auto y) {
  const V a = x, b = y;
  return a < b ? b : a;
}
template <typename T, typename V = emu::Value<T>>
V clamp(T x, Same<V> auto low, Same<V> auto high) {
  return min(max(x, low), high);
}
template <typename T, typename V = emu::Value<T>>
V abs(T value) {
  const V x = value;
  return x < V(0) ? V(-x) : x;
}
template <typename T, typename V = emu::Value<T>>
V fma(T a, Same<V> auto b, Same<V> auto c) {
  return V(std::fma(float(V(a)), float(V(b)), float(V(c))));
}
template <typename T, typename V = emu::Value<T>>
V select(T no, Same<V> auto yes, bool condition) {
  return condition ? V(yes) : V(no);
}
template <typename T>
bool isnan(T x) {
  return std::isnan(float(emu::Value<T>(x)));
}
template <typename T>
bool isinf(T x) {
  return std::isinf(float(emu::Value<T>(x)));
}
using std::is_same_v;
using std::numeric_limits;

}  // namespace metal

template <typename To, typename From>
To as_type(From x) {
  return std::bit_cast<To>(x);
}

using namespace metal;
#define thread
#define constant const  // the remaining uses are constants at program scope
