#include "vectors.h"

#include <cstdlib>
#include <vector>

namespace jax_roipool {
namespace {

// The sets that this library and this processor have, best first.
std::vector<Vectors> usable_vectors() {
  std::vector<Vectors> usable;
#if defined(JAX_ROIPOOL_X86_VECTORS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    usable.push_back({"avx512", &avx512::kMaximumTables, &avx512::kSumTables});
  }
  if (__builtin_cpu_supports("avx2"))
    usable.push_back({"avx2", &avx2::kMaximumTables, &avx2::kSumTables});
#endif
  usable.push_back({"baseline", &baseline::kMaximumTables, &baseline::kSumTables});
  return usable;
}

Vectors choose() {
  const std::vector<Vectors> usable = usable_vectors();
  const char* const variable = std::getenv("JAX_ROIPOOL_CPU_VECTORS");
  const std::string wanted = variable == nullptr ? "" : variable;
  if (wanted.empty()) return usable.front();
  std::string names;
  for (const Vectors& vectors : usable) {
    if (wanted == vectors.name) return vectors;
    names += std::string(names.empty() ? "" : ", ") + vectors.name;
  }
  return {"none", nullptr, nullptr,
          "the environment variable JAX_ROIPOOL_CPU_VECTORS must be unset or one of " + names +
              ", which this library and this processor have, got " + wanted};
}

}  // namespace

const Vectors& vectors() {
  static const Vectors chosen = choose();
  return chosen;
}

}  // namespace jax_roipool

const char* jax_roipool_cpu_vectors() {
  const jax_roipool::Vectors& vectors = jax_roipool::vectors();
  return vectors.problem.empty() ? vectors.name : vectors.problem.c_str();
}
