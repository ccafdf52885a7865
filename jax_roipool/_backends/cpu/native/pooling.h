// The three primitives on plain memory: what is done for each RoI, and how threads share it.
#pragma once

#include "channel_loops.h"
#include "parallel.h"
#include "shapes.h"

namespace jax_roipool {

// `argmax` may be null.
void rectangle_max(const ChannelLoops& loops, const MapShape& map, const PooledShape& shape,
                   const void* features, const Rectangles& rectangles, bool empty_is_lowest,
                   void* pooled, void* argmax, const Threads& threads);

void gather_at_argmax(const ChannelLoops& loops, const MapShape& map, const PooledShape& shape,
                      const void* features, const void* argmax, const int32_t* image_index,
                      void* tangent, const Threads& threads);

// `gradient` is of the type that sums are in. Every sum is in the order of RoIs and bins, whatever
// the number of threads.
void scatter_at_argmax(const ChannelLoops& loops, const MapShape& map, const PooledShape& shape,
                       const void* cotangent, const void* argmax, const int32_t* image_index,
                       void* gradient, const Threads& threads);

}  // namespace jax_roipool
