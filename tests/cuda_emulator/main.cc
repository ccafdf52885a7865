// Launches the kernel that it is linked with, once for each request on the standard input: how many
// blocks and threads, operands and results, and bytes of each of them, all int64, and the operands.
// The results go to the standard output. Each array has memory of its own, for AddressSanitizer.
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda.h"

bool threads_meet();
size_t num_arrays();
void run_thread(void** arrays);

using emulator::kMostThreads, emulator::kWarp, emulator::Meeting;

namespace {

enum class State { kRuns, kWaitsForWarp, kWaitsForBlock, kIsDone };

constexpr size_t kStackSize = 1 << 16;
ucontext_t scheduler, fibers[kMostThreads];
char stacks[kMostThreads][kStackSize];
State states[kMostThreads];
void** the_arrays;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

void run_fiber() {
  run_thread(the_arrays);
  states[threadIdx.x] = State::kIsDone;
}

// Whether all threads from `first` to `end` wait for each other, and go on.
bool all_have_met(State waiting, int first, int end) {
  int count = 0;
  for (int i = first; i < end; ++i) count += states[i] == waiting;
  if (count < end - first) return false;
  for (int i = first; i < end; ++i) states[i] = State::kRuns;
  return true;
}

void run_until_it_waits_for_others(int warp) {
  do {
    for (int i = warp; i < warp + kWarp; ++i) {
      threadIdx.x = i;
      if (states[i] == State::kRuns) swapcontext(&scheduler, &fibers[i]);
    }
  } while (all_have_met(State::kWaitsForWarp, warp, warp + kWarp));
}

void run_block(int threads) {
  for (int i = 0; i < threads; ++i) {
    states[i] = State::kRuns;
    getcontext(&fibers[i]);
    fibers[i].uc_stack.ss_sp = stacks[i];
    fibers[i].uc_stack.ss_size = kStackSize;
    fibers[i].uc_link = &scheduler;
    makecontext(&fibers[i], run_fiber, 0);
  }
  do {
    for (int warp = 0; warp < threads; warp += kWarp) run_until_it_waits_for_others(warp);
  } while (all_have_met(State::kWaitsForBlock, 0, threads));
  for (int i = 0; i < threads; ++i) {
    if (states[i] != State::kIsDone) fail("a thread waits where others do not come");
  }
}

void read(void* to, size_t bytes) {
  if (bytes > 0 && std::fread(to, bytes, 1, stdin) != 1) fail("the request ends early");
}

}  // namespace

void emulator::meet(Meeting meeting) {
  if (!threads_meet()) fail("threads meet that do not run as fibers");
  const unsigned thread = threadIdx.x;
  states[thread] = meeting == Meeting::kOfWarp ? State::kWaitsForWarp : State::kWaitsForBlock;
  swapcontext(&fibers[thread], &scheduler);
}

int main() {
  for (int64_t sizes[4]; std::fread(sizes, sizeof sizes, 1, stdin) == 1;) {
    const int64_t blocks = sizes[0], threads = sizes[1], operands = sizes[2];
    const int64_t count = operands + sizes[3];
    if (size_t(count) != num_arrays()) fail("the kernel has another number of arrays");
    std::vector<int64_t> bytes(count);
    read(bytes.data(), count * sizeof(int64_t));
    std::vector<void*> arrays;
    for (const int64_t size : bytes) {
      arrays.push_back(std::malloc(size));
      std::memset(arrays.back(), 0xa5, size);  // results are full of rubbish
    }
    for (int64_t i = 0; i < operands; ++i) read(arrays[i], bytes[i]);

    the_arrays = arrays.data();
    if (threads > kMostThreads || threads % kWarp != 0) fail("a block has other threads");
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
      if (threads_meet()) {
        run_block(threads);
      } else {
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) run_thread(the_arrays);
      }
    }
    for (int64_t i = operands; i < count; ++i) std::fwrite(arrays[i], bytes[i], 1, stdout);
    std::fflush(stdout);
    for (void* array : arrays) std::free(array);
  }
}
