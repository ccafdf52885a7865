// One loop over many threads, on a pool that may be busy.
#pragma once

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

namespace jax_roipool {

struct Threads {
  int64_t count;
  std::function<void(std::function<void()>)> schedule;  // runs it some time, on some thread
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

// Runs task(0), ..., task(tasks - 1), some of them at the same time.
//
// Whoever is free takes the next task. The caller takes part, so all of them get done even if the
// pool never starts anything; it waits only for tasks that are under way. What starts late finds
// no task left, and touches nothing but the shared state.
inline void parallel_for(const Threads& threads, int64_t tasks,
                         const std::function<void(int64_t)>& task) {
  struct State {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> left;
    std::mutex mutex;
    std::condition_variable done;
  };
  const auto state = std::make_shared<State>();
  state->left = tasks;
  const auto work = [state, tasks, &task] {
    const DefaultFloatEnvironment environment;
    for (int64_t i; (i = state->next.fetch_add(1)) < tasks;) {
      task(i);
      if (state->left.fetch_sub(1) == 1) {
        const std::lock_guard lock(state->mutex);
        state->done.notify_one();
      }
    }
  };
  const int64_t helpers = std::min(threads.count, tasks) - 1;
  for (int64_t i = 0; i < helpers; ++i) threads.schedule(work);
  work();
  std::unique_lock lock(state->mutex);
  state->done.wait(lock, [&] { return state->left <= 0; });
}

}  // namespace jax_roipool
