// The sets of vector instructions that the channel loops are compiled for, and the choice of one.
#pragma once

#include "channel_loops.h"

namespace jax_roipool {

struct Vectors {
  const char* name;
  const Tables* tables;
};

// The best that this processor has, or the one that the environment variable
// JAX_ROIPOOL_CPU_VECTORS names, as long as the processor has it.
const Vectors& vectors();

}  // namespace jax_roipool
