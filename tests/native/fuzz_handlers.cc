// Calls the handlers as XLA does, on random and on hostile inputs, and compares what they compute
// with loops that are too plain to be wrong. Run it under sanitizers: `run_sanitized`.
//
//   fuzz_handlers [cases [first case]]
//   fuzz_handlers --vectors        prints the set of vector instructions in use
//   fuzz_handlers --no-vectors     checks that every call is an error if a set is asked for that
//                                  there is not
//
// Case number i, one of each family, is the same in every run, so one that has failed can be run
// alone.
#include <unistd.h>

#include <csignal>

#include "fuzzing.h"

extern "C" const char* jax_roipool_cpu_vectors();

namespace fuzz {
namespace {

constexpr unsigned kWatchdogSeconds = 60;  // for one case

const Family* const kFamilies[] = {&kMaxima, &kSums};

void check_case(uint64_t number, const std::vector<Pool*>& pools) {
  const FloatEnvironment environment(/*flush=*/false);
  for (const Family* const family : kFamilies) {
    alarm(kWatchdogSeconds);
    const auto checked = family->make_case(number);
    for (const Target& target : family->targets) checked->check(target, pools);
  }
}

// Eight devices and the tasks of a pool share two threads.
void check_concurrent_calls(uint64_t first, uint64_t cases) {
  Pool pool("shared", 2, Start::kAtOnce);
  std::vector<std::thread> devices;
  for (uint64_t device = 0; device < 8; ++device) {
    devices.emplace_back([&pool, first, cases, device] {
      for (uint64_t i = device; i < cases; i += 8) check_case(first + i, {&pool});
    });
    pool.schedule([&pool, first, device] { check_case(first + device, {&pool}); });
  }
  for (std::thread& device : devices) device.join();
}

// The environment variable is read once, by the first call.
void check_calls_without_vectors() {
  setenv("JAX_ROIPOOL_CPU_VECTORS", "sse9", 1);
  const std::string wanted =
      "the environment variable JAX_ROIPOOL_CPU_VECTORS must be unset or one of ";
  Pool pool("none", 0, Start::kNever);
  for (const Family* const family : kFamilies) {
    const auto right = family->make_case(0);
    for (const Target& target : family->targets) {
      std::vector<Array> arrays = right->arrays(target);
      const Outcome outcome = call(target.handler, pool, arrays, target.args,
                                   right->signature().attributes(target), true);
      if (outcome.code == XLA_FFI_Error_Code_INVALID_ARGUMENT &&
          outcome.message.rfind(std::string(target.name) + ": " + wanted, 0) == 0 &&
          outcome.message.find("baseline") != std::string::npos &&
          outcome.message.find("sse9") != std::string::npos) {
        continue;
      }
      fail(std::string(target.name) + ": vectors \"sse9\" give \"" + outcome.message + "\"");
    }
  }
  if (std::string(jax_roipool_cpu_vectors()).rfind(wanted, 0) != 0) {
    fail(std::string("the vectors are \"") + jax_roipool_cpu_vectors() + "\"");
  }
}

void on_alarm(int) {
  constexpr char kMessage[] = "fuzz_handlers: a call does not return\n";
  const auto written = write(STDERR_FILENO, kMessage, sizeof kMessage - 1);
  _exit(written < 0 ? 2 : 1);
}

void run(uint64_t cases, uint64_t first) {
  std::signal(SIGALRM, on_alarm);
  for (const Family* const family : kFamilies) family->check_wrong_calls();
  Pool none("none", 0, Start::kNever), one("of 1", 1, Start::kAtOnce);
  Pool two("of 2", 2, Start::kAtOnce), late("of 3, late", 3, Start::kLate);
  Pool never("of 5, never", 5, Start::kNever), refused("of 4, refused", 4, Start::kRefused);
  Pool eight("of 8", 8, Start::kAtOnce);
  for (uint64_t i = first; i < first + cases; ++i) {
    check_case(i, {&none, &one, &two, &late, &never, &refused, &eight});
    never.run_what_is_left();  // when the arrays of the calls are gone
  }
  check_concurrent_calls(first, cases);
}

}  // namespace
}  // namespace fuzz

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "--vectors") {
    std::puts(jax_roipool_cpu_vectors());
    return 0;
  }
  if (argc > 1 && std::string(argv[1]) == "--no-vectors") {
    fuzz::check_calls_without_vectors();
    return 0;
  }
  fuzz::run(argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 500,
            argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
  return 0;
}
