// The three primitives on plain memory: what is done for each RoI, and how threads share the work.
//
// Features and gradient are [num_groups, num_images, height, width, channels], and pooled, argmax,
// tangent and cotangent are [num_groups, num_rois, bin_rows, bin_cols, channels]. The result of a
// RoI without an image is 0, with an argmax of -1, and its cotangent goes nowhere.
#pragma once

#include "loops.h"
#include "parallel.h"
#include "shapes.h"

namespace jax_roipool {

// `argmax` may be null, and so may `onto`. With that, a RoI without an image keeps what it has
// there.
void rectangle_max(const MaximumLoops& loops, const MapShape& map, const PooledShape& shape,
                   const void* features, const Rectangles& rectangles, bool empty_is_lowest,
                   const void* onto, void* pooled, void* argmax, const Threads& threads);

void gather_at_argmax(const MaximumLoops& loops, const MapShape& map, const PooledShape& shape,
                      const void* features, const void* argmax, const Rectangles& rectangles,
                      void* tangent, const Threads& threads);

// `gradient` is of the type that sums are in. Every sum is in the order of RoIs and bins, whatever
// the number of threads.
void scatter_at_argmax(const MaximumLoops& loops, const MapShape& map, const PooledShape& shape,
                       const void* cotangent, const void* argmax, const Rectangles& rectangles,
                       void* gradient, const Threads& threads);

}  // namespace jax_roipool
