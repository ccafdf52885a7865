#include "vectors.h"

#include <cstdlib>
#include <cstring>

namespace jax_roipool {

#if defined(JAX_ROIPOOL_X86_VECTORS)
namespace avx512 {
extern const Tables kTables;
}
namespace avx2 {
extern const Tables kTables;
}
#endif
namespace baseline {
extern const Tables kTables;
}

namespace {

Vectors choose() {
  const char* const wanted = std::getenv("JAX_ROIPOOL_CPU_VECTORS");
  const auto may_be = [&](const char* name) {
    return wanted == nullptr || std::strcmp(wanted, name) == 0;
  };
#if defined(JAX_ROIPOOL_X86_VECTORS)
  __builtin_cpu_init();
  if (may_be("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return {"avx512", &avx512::kTables};
  }
  if (may_be("avx2") && __builtin_cpu_supports("avx2")) return {"avx2", &avx2::kTables};
#endif
  (void)may_be;
  return {"baseline", &baseline::kTables};
}

}  // namespace

const Vectors& vectors() {
  static const Vectors chosen = choose();
  return chosen;
}

}  // namespace jax_roipool
