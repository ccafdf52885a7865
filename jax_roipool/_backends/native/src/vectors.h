// The choice among the sets of vector instructions that the channel loops are compiled for.
#pragma once

#include <string>

#include "loops.h"

#if defined(_WIN32)
#define EXPORTED __declspec(dllexport)
#else
#define EXPORTED __attribute__((visibility("default")))
#endif

namespace jax_roipool {

struct Vectors {
  const char* name;
  const MaximumTables* maxima;  // null if there is a problem, as the other
  const SumTables* sums;
  std::string problem = "";  // why no set could be chosen
};

// The best set that this processor has, or the one that the environment variable
// JAX_ROIPOOL_CPU_VECTORS names. It is a problem if the library or the processor has no such set.
const Vectors& vectors();

}  // namespace jax_roipool

// The name of the vector instructions in use, or why there are none.
extern "C" EXPORTED const char* jax_roipool_cpu_vectors();
