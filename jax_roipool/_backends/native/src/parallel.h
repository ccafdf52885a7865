// Loops over many threads, on a pool that may be busy.
#pragma once

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <new>

#include "shapes.h"

namespace jax_roipool {

struct Threads {
  int64_t count;
  // Runs a function at some time, on some thread.
  std::function<void(std::function<void()>)> schedule;

  // No more of them than this work on so many tasks.
  int64_t workers(int64_t tasks) const { return std::max<int64_t>(1, std::min(count, tasks)); }
};

// XLA's threads take subnormals for zeros; here they are numbers.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&before_); }

 private:
  std::fenv_t before_;
};

// Runs task(0, worker), ..., task(tasks - 1, worker), some of them at the same time, but none of
// the same worker, who is in [0, threads.workers(tasks)). A task must not throw.
//
// Whoever is free takes the next task. The caller takes part, so all tasks get done even if the
// pool never starts anything; the caller waits only for tasks that are under way. A helper that
// starts late finds no task left, and touches nothing but the shared state.
inline void parallel_for(const Threads& threads, int64_t tasks,
                         const std::function<void(int64_t, int64_t)>& task) {
  struct State {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> left;
    std::mutex mutex;
    std::condition_variable done;
  };
  const auto state = std::make_shared<State>();
  state->left = tasks;
  const auto work = [state, tasks, &task](int64_t worker) noexcept {
    const DefaultFloatEnvironment environment;
    for (int64_t i; (i = state->next.fetch_add(1)) < tasks;) {
      task(i, worker);
      if (state->left.fetch_sub(1) == 1) {
        const std::lock_guard lock(state->mutex);
        state->done.notify_one();
      }
    }
  };
  try {
    for (int64_t i = 1; i < threads.workers(tasks); ++i) {
      threads.schedule([work, i] { work(i); });
    }
  } catch (const std::bad_alloc&) {
    // There are fewer helpers. Those that have started use `task`, so this function goes on.
  }
  work(0);
  std::unique_lock lock(state->mutex);
  state->done.wait(lock, [&] { return state->left <= 0; });
}

// So many workers share out the rows of all RoIs' bins.
inline int64_t workers_on_bins(const Threads& threads, const PooledShape& shape) {
  return threads.workers(shape.rois() * shape.bin_rows);
}

// Runs task(roi, rows of bins, worker) for all rows of all RoIs. Neighbouring bins read the same
// cells, so a task has whole RoIs if there are many, and else single rows.
inline void parallel_for_bins(const Threads& threads, const PooledShape& shape,
                              const std::function<void(int64_t, Range, int64_t)>& task) {
  const int64_t parts = shape.rois() < 8 * threads.count ? shape.bin_rows : 1;
  parallel_for(threads, shape.rois() * parts, [&](int64_t i, int64_t worker) {
    const int64_t rows = shape.bin_rows / parts, first = i % parts * rows;
    task(i / parts, {first, first + rows}, worker);
  });
}

}  // namespace jax_roipool
