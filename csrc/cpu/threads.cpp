#include "cpu/threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif

namespace segtrain::cpu {

int n_threads() {
  static const int n = [] {
    if (const char* set = std::getenv("MLX_SEGTRAIN_THREADS")) return std::max(1, std::atoi(set));
#ifdef __linux__
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) return std::max(1, CPU_COUNT(&allowed));
#endif
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  }();
  return n;
}

namespace {

/// A batch of jobs. Threads share ownership, because the batch must live until the last helper thread has
/// finished with it.
struct Batch {
  const std::function<void(int)>* job;
  int n;
  std::atomic<int> next{0};
  std::atomic<int> done{0};
  std::exception_ptr error;
  std::mutex error_lock;

  void work() {
    for (int i; (i = next.fetch_add(1)) < n;) {
      try {
        (*job)(i);
      } catch (...) {
        std::lock_guard lock(error_lock);
        error = std::current_exception();
      }
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

/// Helper threads that sleep between batches. They run one batch at a time.
class Pool {
 public:
  Pool() {
    for (int i = 1; i < n_threads(); ++i) std::thread([this] { help(); }).detach();
  }

  void run(int n, const std::function<void(int)>& job) {
    auto batch = std::make_shared<Batch>();
    batch->job = &job;
    batch->n = n;
    {
      std::lock_guard lock(mutex_);
      batch_ = batch;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    batch->work();
    while (batch->done.load(std::memory_order_acquire) < n) std::this_thread::yield();
    if (batch->error) std::rethrow_exception(batch->error);
  }

 private:
  void help() {
    for (unsigned seen = 0;;) {
      std::shared_ptr<Batch> batch;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
        seen = generation_.load();
        batch = batch_;
      }
      batch->work();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::shared_ptr<Batch> batch_;
  std::atomic<unsigned> generation_{0};
};

}  // namespace

void parallel_for(int n, const std::function<void(int)>& job) {
  if (n <= 1 || n_threads() == 1) {
    for (int i = 0; i < n; ++i) job(i);
    return;
  }
  static Pool* pool = new Pool;  // never destroyed: its threads may still run after static destructors
  static std::mutex one_at_a_time;
  std::lock_guard lock(one_at_a_time);
  pool->run(n, job);
}

int split(int n, int most, int align) {
  int runs = (n + most - 1) / most;
  int threads = n_threads();
  runs = (runs + threads - 1) / threads * threads;
  int length = (n + runs - 1) / runs;
  return std::max(align, (length + align - 1) / align * align);
}

}  // namespace segtrain::cpu
