// Maxima of tiles of 2x2, 4x4, ... cells, so that a large bin reads far fewer than all its cells.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "channel_loops.h"
#include "parallel.h"
#include "shapes.h"

namespace jax_roipool {

// Tiles of 2^level x 2^level cells of an image, those that are whole. At level 0 they are its
// cells.
struct Level {
  const void* values;  // [height, width, channels]
  const void* argmax;  // likewise; null at level 0, and where no argmax is wanted
  int64_t height, width;
};

class Pyramid {
 public:
  // Tiles are made for those images where they save more reads than they cost. They take up to a
  // third of the memory of the features, and as much again per byte of an argmax.
  Pyramid(const ChannelLoops& loops, const MapShape& map, const PooledShape& shape,
          const void* features, const Rectangles& rectangles, bool with_argmax,
          const Threads& threads);

  // The levels of an image; at least level 0.
  const std::vector<Level>& levels(int64_t image) const { return images_[image]; }

 private:
  bool allocate_levels(const ChannelLoops& loops, int64_t channels, int64_t count, bool with_argmax,
                       std::vector<Level>& levels);

  std::vector<std::vector<Level>> images_;
  std::vector<std::unique_ptr<char[]>> memory_;
};

}  // namespace jax_roipool
