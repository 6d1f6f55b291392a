// Runs the threads of a kernel and checks their accesses. This part of the emulator does not depend on the
// kernel.
#include "emulator.h"
// These words are keywords in kernels, but names in the headers of libraries.
#undef thread
#undef constant
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <numeric>
#include <random>

namespace emu {

Machine machine;
int64_t conversions;

void fail(const char* format, ...) {
  char text[400];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  auto g = self().at.threadgroup_position_in_grid;
  char where[100];
  snprintf(where, sizeof where, " [thread %d of threadgroup %u,%u,%u]", self().index, g.x, g.y, g.z);
  machine.error = std::string(text) + where;
  _longjmp(machine.scheduler, 1);  // the fibers are never resumed
}

void wait(State state, const char* op, int line) {
  Fiber& f = self();
  f.state = state, f.op = op, f.line = line;
  if (!_setjmp(f.here)) _longjmp(machine.scheduler, 1);
}

static bool before(const Touch& touch, const Fiber& f) {
  return touch.index < 0 || touch.index == f.index || touch.epoch < f.epoch ||
         (touch.index / LANES == f.simd && touch.simd_epoch < f.simd_epoch);
}

static void touch_shared(Block& b, size_t at, size_t bytes, size_t element, bool write) {
  const Fiber& f = self();
  for (size_t i = at / 2; i < (at + bytes + 1) / 2; ++i) {
    Shadow& s = b.shadow[i];
    if (!write && s.write.index < 0)
      fail("%s[%zu] is read before it is written", b.name.c_str(), at / element);
    for (const Touch* t : {&s.write, &s.reads[0], &s.reads[1]})
      if ((write || t == &s.write) && !before(*t, f))
        fail("race: %s[%zu] is %s while thread %d %s it, with no barrier between", b.name.c_str(),
             at / element, write ? "written" : "read", t->index, t == &s.write ? "writes" : "reads");
    Touch mine{f.index, f.epoch, f.simd_epoch};
    if (write) {
      s = {mine, {}};
    } else {
      if (s.reads[0].index != f.index) s.reads[1] = s.reads[0];
      s.reads[0] = mine;
    }
  }
}

static void count(const Block& b, size_t bytes, bool write) {
  Counts& c = machine.counts;
  if (b.kind == Block::SHARED) {
    (write ? c.threadgroup_written : c.threadgroup_read) += bytes;
    ++(write ? c.threadgroup_writes : c.threadgroup_reads);
  } else {
    (write ? c.device_written : c.device_read) += bytes;
    ++c.device_accesses;
  }
}

void touch(Block& b, ptrdiff_t at, size_t bytes, bool write) {
  count(b, bytes, write);
  if (at < 0 || at + bytes > b.size)
    fail("%s out of bounds: %s[%td] of %zu", write ? "write" : "read", b.name.c_str(), at / ptrdiff_t(bytes),
         b.size / bytes);
  if (b.kind == Block::SHARED) return touch_shared(b, at, bytes, bytes, write);
  if (b.kind == Block::INPUT) return;
  for (size_t i = at; i < at + bytes; ++i) {
    if (!write && !b.writers[i]) fail("%s[%zu] is read before it is written", b.name.c_str(), at / bytes);
    if (b.writers[i] && b.writers[i] != self().thread)
      fail("%s[%zu] is %s after another thread wrote it", b.name.c_str(), at / bytes,
           write ? "written" : "read");
    if (write) b.writers[i] = self().thread;
  }
}

Block& shared_block(const char* name, size_t bytes) {
  size_t total = 0;
  for (auto& b : machine.shared) {
    if (b.name == name) return b;
    total += b.size;
  }
  auto& b = machine.shared.emplace_back(Block{Block::SHARED, name, nullptr, bytes, {}, {}, {}});
  b.storage.assign(b.size, '\xff');  // NaN in every floating type
  b.data = b.storage.data();
  b.shadow.resize((b.size + 1) / 2);
  if (total + b.size > SHARED_LIMIT)
    fail("threadgroup memory of %zu bytes is over the limit of %zu", total + b.size, SHARED_LIMIT);
  return b;
}

static void enter() {
  machine.kernel();
  wait(State::RETURNED, "", 0);
}

[[gnu::noinline]] static void resume(Fiber& f) {
  machine.self = &f;
  if (_setjmp(machine.scheduler)) return;
  if (f.started) _longjmp(f.here, 1);
  f.started = true;
  setcontext(&f.start);
}

static std::vector<int> order_of(int n, int order, std::mt19937& random) {
  std::vector<int> x(n);
  std::iota(x.begin(), x.end(), 0);
  if (order == 1) std::reverse(x.begin(), x.end());
  if (order > 1) std::shuffle(x.begin(), x.end(), random);
  return x;
}

static std::string describe(const Fiber& f) {
  auto text = "thread " + std::to_string(f.index);
  if (f.state == State::RETURNED) return text + " has returned";
  return text + " waits in " + f.op + " (line " + std::to_string(f.line) + ")";
}

/// Runs one threadgroup. Returns false if there is an error.
static bool run_group(int order, std::mt19937& random) {
  auto& m = machine;
  while (true) {
    for (int s : order_of(m.simds.size(), order, random)) {
      bool ran = true;
      while (ran) {
        ran = false;
        for (int lane : order_of(m.simds[s].lanes, order, random)) {
          Fiber& f = m.fibers[s * LANES + lane];
          if (f.state != State::READY) continue;
          resume(f);
          if (!m.error.empty()) return false;
          ran = true;
        }
      }
    }
    // No thread can continue: all threads have returned, or all wait at the same barrier, or they have
    // diverged.
    const Fiber& one = m.fibers[0];
    for (auto& f : m.fibers)
      if (f.state != one.state || f.line != one.line || f.state == State::IN_SIMD) {
        // If a single simdgroup has diverged, the error names two of its threads, and `one` need not be one
        // of them.
        const Fiber* stuck = &f;
        for (auto& g : m.fibers)
          if (g.state == State::IN_SIMD) stuck = &g;
        const Fiber* other = &one;
        for (auto& g : m.fibers)
          if (g.simd == stuck->simd && (g.state != stuck->state || g.line != stuck->line)) other = &g;
        m.error =
            "barrier or simdgroup operation is divergent: " + describe(*other) + ", " + describe(*stuck);
        return false;
      }
    if (one.state == State::RETURNED) return true;
    for (auto& f : m.fibers) f.state = State::READY;
  }
}

/// Runs all threadgroups. Returns false if there is an error.
static bool run(void (*kernel)(), const Launch& launch) {
  auto& m = machine;
  m.kernel = kernel;
  m.error.clear();
  m.counts = {};
  conversions = 0;
  std::mt19937 random(launch.order);
  auto vec3 = [](const int* x) { return uint3(x[0], x[1], x[2]); };
  const uint3 grid = vec3(launch.grid), size = vec3(launch.threadgroup);
  uint3 groups;
  for (int i = 0; i < 3; ++i) groups[i] = (grid[i] + size[i] - 1) / size[i];
  const int most = size.x * size.y * size.z;
  static char* stacks = nullptr;
  static int have = 0;
  if (have < most) {
    stacks = static_cast<char*>(
        mmap(nullptr, most * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    have = most;
  }
  int thread = 0;
  const int n_groups = groups.x * groups.y * groups.z;
  for (int g : order_of(n_groups, launch.order, random)) {
    uint3 at(g % groups.x, g / groups.x % groups.y, g / groups.x / groups.y), here;
    // Metal truncates the threadgroups at the end of the grid.
    for (int i = 0; i < 3; ++i) here[i] = std::min(size[i], grid[i] - at[i] * size[i]);
    const int n = here.x * here.y * here.z;
    const uint n_simds = (n + LANES - 1) / LANES;
    m.fibers.resize(n);
    m.simds.assign(n_simds, {});
    m.shared.clear();
    for (int i = 0; i < n; ++i) {
      Fiber& f = m.fibers[i];
      f.started = false, f.state = State::READY, f.op = "", f.line = 0;
      f.index = i, f.simd = i / LANES, f.thread = ++thread, f.epoch = f.simd_epoch = 0;
      ++m.simds[f.simd].lanes;
      uint3 mine(i % here.x, i / here.x % here.y, i / here.x / here.y), global;
      for (int j = 0; j < 3; ++j) global[j] = at[j] * size[j] + mine[j];
      const uint quads = (n + 3) / 4, lane = i % LANES;
      f.at = {uint(most + 3) / 4,
              uint(most + LANES - 1) / LANES,
              size,
              uint3(0),
              grid,
              uint(i) / 4,
              quads,
              uint(f.simd),
              n_simds,
              LANES,
              uint(i) % 4,
              lane,
              uint(i),
              global,
              mine,
              at,
              groups,
              grid,
              LANES,
              here};
      getcontext(&f.start);
      f.start.uc_stack.ss_sp = stacks + i * STACK;
      f.start.uc_stack.ss_size = STACK;
      f.start.uc_link = nullptr;
      makecontext(&f.start, enter, 0);
    }
    if (!run_group(launch.order, random)) return false;
  }
  return true;
}

const char* launch(void (*kernel)(), const Argument* args, int n, const Launch& at) {
  auto& blocks = machine.blocks;
  blocks.clear();
  for (auto* a = args; a < args + n; ++a) {
    auto kind = a->output ? Block::OUTPUT : Block::INPUT;
    auto& b = blocks.emplace_back(Block{kind, a->name, a->data, a->size, {}, {}, {}});
    if (a->output) b.writers.resize(b.size);
  }
  if (!run(kernel, at)) return machine.error.c_str();
  machine.counts.conversions = conversions;
  for (int i = 0; i < n; ++i) {
    auto& w = blocks[i].writers;
    auto hole = std::find(w.begin(), w.end(), 0);
    if (hole == w.end()) continue;
    machine.error =
        blocks[i].name + "[" + std::to_string((hole - w.begin()) / args[i].element) + "] is never written";
    return machine.error.c_str();
  }
  return nullptr;
}

Block* block(int i) {
  return &machine.blocks[i];
}

Block* constants(const char* name, void* data, size_t size) {
  return new Block{Block::INPUT, name, static_cast<char*>(data), size, {}, {}, {}};
}

}  // namespace emu
