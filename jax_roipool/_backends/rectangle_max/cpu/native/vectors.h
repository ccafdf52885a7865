// The choice among the sets of vector instructions that the channel loops are compiled for.
#pragma once

#include <string>

#include "channel_loops.h"

namespace jax_roipool {

struct Vectors {
  const char* name;
  const Tables* tables;      // null if there is a problem
  std::string problem = "";  // why no set could be chosen
};

// The best set that this processor has, or the one that the environment variable
// JAX_ROIPOOL_CPU_VECTORS names. It is a problem if the library or the processor has no such set.
const Vectors& vectors();

}  // namespace jax_roipool
