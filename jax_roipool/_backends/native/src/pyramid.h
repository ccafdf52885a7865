// Maxima of tiles of 2x2, 4x4, ... cells, so that a large bin reads far fewer than all its cells.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "costs.h"
#include "loops.h"
#include "parallel.h"
#include "shapes.h"

namespace jax_roipool {

// The whole tiles of 2^level x 2^level cells of an image. At level 0 they are the image's cells.
struct Level {
  const void* values;  // [height, width, channels]
  const void* argmax;  // [height, width, channels]; null at level 0, and where no argmax is wanted
  int64_t height, width;
};

class Pyramid {
 public:
  // `features` are [num_groups, num_images, height, width, channels]. Tiles are made for those
  // images where they save more reads than they cost, and not where there is too little memory for
  // them. They take up to a third of the memory of the features, and as much again per byte of an
  // argmax.
  Pyramid(const MaximumLoops& loops, const MapShape& map, const PooledShape& shape,
          const void* features, const Rectangles& rectangles, bool with_argmax, const Costs& costs,
          const Threads& threads);

  // The levels of an image, at least level 0. `image` counts the images of all groups.
  const std::vector<Level>& levels(int64_t image) const { return images_[image].levels; }
  bool has_tiles(int64_t image) const { return levels(image).size() > 1; }

 private:
  struct Image {
    std::vector<Level> levels;
    // memory[i] holds level i + 1: its values, and then its argmaxes.
    std::vector<std::unique_ptr<char[]>> memory;
  };

  static bool add_levels(const MaximumLoops& loops, int64_t channels, int64_t count,
                         bool with_argmax, Image& image);
  static void make_tiles(const MaximumLoops& loops, int64_t channels, const Image& image,
                         size_t level, int64_t band);

  std::vector<Image> images_;
};

}  // namespace jax_roipool
