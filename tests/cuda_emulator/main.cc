// Launches the kernel that it is linked with, once for each request on the standard input: how many
// blocks and threads, operands and results, and bytes of each of them, all int64, and the operands.
// The results go to the standard output. Each array has memory of its own, for AddressSanitizer.
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda.h"

size_t num_arrays();
void run_thread(void** arrays);

using emulator::kLanes;

namespace {

constexpr size_t kStackSize = 1 << 18;
ucontext_t scheduler, lanes[kLanes];
char stacks[kLanes][kStackSize];
bool is_done[kLanes], is_warp;
int num_waiting;
void** the_arrays;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

void run_lane() {
  run_thread(the_arrays);
  is_done[threadIdx.x] = true;
}

void run_warp() {
  for (int lane = 0; lane < kLanes; ++lane) {
    is_done[lane] = false;
    getcontext(&lanes[lane]);
    lanes[lane].uc_stack.ss_sp = stacks[lane];
    lanes[lane].uc_stack.ss_size = kStackSize;
    lanes[lane].uc_link = &scheduler;
    makecontext(&lanes[lane], run_lane, 0);
  }
  for (int num_done = 0; num_done < kLanes;) {
    num_waiting = num_done = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      threadIdx.x = lane;
      if (!is_done[lane]) swapcontext(&scheduler, &lanes[lane]);
      num_done += is_done[lane];
    }
    if (num_done < kLanes && num_waiting < kLanes) fail("a lane ends where others wait for it");
  }
}

void read(void* to, size_t bytes) {
  if (bytes > 0 && std::fread(to, bytes, 1, stdin) != 1) fail("the request ends early");
}

}  // namespace

void emulator::meet() {
  if (!is_warp) fail("threads meet in a block of more than a warp");
  const unsigned lane = threadIdx.x;
  ++num_waiting;
  swapcontext(&lanes[lane], &scheduler);
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
    is_warp = threads == kLanes;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
      if (is_warp) {
        run_warp();
      } else {
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) run_thread(the_arrays);
      }
    }
    for (int64_t i = operands; i < count; ++i) std::fwrite(arrays[i], bytes[i], 1, stdout);
    std::fflush(stdout);
    for (void* array : arrays) std::free(array);
  }
}
