// The three primitives on plain memory: what is done for each RoI, and how threads share it.
#pragma once

#include <cstdint>

#include "channel_loops.h"
#include "parallel.h"

namespace jax_roipool {

// [groups, images, height, width, channels]
struct MapShape {
  int64_t groups, images, height, width, channels;

  int64_t cells() const { return height * width; }
  int64_t image_size() const { return cells() * channels; }
};

// [groups, rois, bin_rows, bin_cols, channels]
struct PooledShape {
  int64_t groups, rois, bin_rows, bin_cols, channels;

  int64_t bins() const { return bin_rows * bin_cols; }
};

struct Rectangles {
  const int32_t* image_index;                // [groups, rois]
  const int32_t *row_start, *row_end;        // [groups, rois, bin_rows]
  const int32_t *col_start, *col_end;        // [groups, rois, bin_cols]
};

// `argmax` may be null.
void rectangle_max(const ChannelLoops& loops, const MapShape& map, const PooledShape& shape,
                   const void* features, const Rectangles& rectangles, bool empty_is_lowest,
                   void* pooled, void* argmax, const Threads& threads);

void gather_at_argmax(const ChannelLoops& loops, const MapShape& map, const PooledShape& shape,
                      const void* features, const void* argmax, const int32_t* image_index,
                      void* tangent, const Threads& threads);

// Every sum is in the order of RoIs and bins, whatever the number of threads.
void scatter_at_argmax(const ChannelLoops& loops, const MapShape& map, const PooledShape& shape,
                       const void* cotangent, const void* argmax, const int32_t* image_index,
                       void* gradient, const Threads& threads);

}  // namespace jax_roipool
