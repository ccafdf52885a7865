#include "pyramid.h"

#include <algorithm>
#include <new>

#include "memory.h"

namespace jax_roipool {
namespace {

// What tiles would do for one image.
struct Use {
  double saved = 0;  // of the cost
  int64_t levels = 0;
};

// `rows` are those of all of the RoI's bins.
void add_roi(Use& use, const Costs& costs, double bin_rows, double rows, const BinCols& cols) {
  const double mean = rows / bin_rows;
  const double without = std::min(costs.cells(mean, cols), costs.strips(mean, cols));
  const double saved = without - costs.tiles(mean, cols);
  if (saved <= 0) return;
  use.saved += bin_rows * saved;
  const double side = std::min(mean, static_cast<double>(cols.sum) / cols.bins);
  while ((4 << use.levels) <= side) ++use.levels;
}

}  // namespace

Pyramid::Pyramid(const MaximumLoops& loops, const MapShape& map, const PooledShape& shape,
                 const void* features, const Rectangles& rectangles, bool with_argmax,
                 const Costs& costs, const Threads& threads) {
  const int64_t num_images = map.num_groups * map.num_images;
  std::vector<Use> uses(num_images);
  BinCols cols(shape);
  for (int64_t roi = 0; roi < shape.num_groups * shape.num_rois; ++roi) {
    const int64_t image_index = rectangles.image_index(roi);
    if (image_index < 0) continue;
    int64_t rows = 0;
    for (int64_t p = 0; p < shape.bin_rows; ++p) rows += rectangles.rows(roi, p).size();
    cols.set(rectangles, roi);
    add_roi(uses[roi / shape.num_rois * map.num_images + image_index], costs, shape.bin_rows, rows,
            cols);
  }

  // The rows of an image that make one row of tiles of its last level.
  struct Band {
    int64_t image, index;
  };
  std::vector<Band> bands;
  images_.resize(num_images);
  for (int64_t i = 0; i < num_images; ++i) {
    Image& image = images_[i];
    image.levels.push_back(
        {at(features, i * map.image_size() * loops.item_size), nullptr, map.height, map.width});
    const Use& use = uses[i];
    if (use.saved <= costs.making_tiles() * map.cells() ||
        !add_levels(loops, map.channels, use.levels, with_argmax, image)) {
      continue;
    }
    const int64_t rows = int64_t{1} << use.levels;
    for (int64_t index = 0; index * rows < map.height; ++index) bands.push_back({i, index});
  }
  parallel_for(threads, bands.size(), [&](int64_t i, int64_t) {
    const Image& image = images_[bands[i].image];
    for (size_t level = 1; level < image.levels.size(); ++level) {
      make_tiles(loops, map.channels, image, level, bands[i].index);
    }
  });
}

// Adds `count` levels whose tiles are still to be made. If there is too little memory for all of
// them, it adds none and returns false: level 0 is enough.
bool Pyramid::add_levels(const MaximumLoops& loops, int64_t channels, int64_t count,
                         bool with_argmax, Image& image) {
  try {
    for (int64_t level = 1; level <= count; ++level) {
      const int64_t height = image.levels[0].height >> level;
      const int64_t width = image.levels[0].width >> level;
      const int64_t values = height * width * channels * loops.item_size;
      const int64_t argmaxes = with_argmax ? height * width * channels * loops.argmax_size : 0;
      image.memory.emplace_back();
      image.memory.back().reset(new char[values + argmaxes]);
      char* const memory = image.memory.back().get();
      prefer_huge_pages(memory, values + argmaxes);
      image.levels.push_back({memory, with_argmax ? memory + values : nullptr, height, width});
    }
    return true;
  } catch (const std::bad_alloc&) {
    image.levels.resize(1);
    image.memory.clear();
    return false;
  }
}

// Makes the tiles of `level` that lie in a band of the image.
void Pyramid::make_tiles(const MaximumLoops& loops, int64_t channels, const Image& image,
                         size_t level, int64_t band) {
  const Level &from = image.levels[level - 1], &to = image.levels[level];
  const int64_t value_bytes = channels * loops.item_size;
  const int64_t argmax_bytes = channels * loops.argmax_size;
  char* const values = image.memory[level - 1].get();
  char* const argmaxes = values + to.height * to.width * value_bytes;
  const int64_t rows = int64_t{1} << (image.levels.size() - 1 - level);
  const int64_t end = std::min((band + 1) * rows, to.height);
  for (int64_t row = band * rows; row < end; ++row) {
    for (int64_t col = 0; col < to.width; ++col) {
      const void *from_values[4], *from_argmaxes[4];
      int32_t indices[4];
      for (int i = 0; i < 4; ++i) {
        const int64_t cell = (2 * row + i / 2) * from.width + 2 * col + i % 2;
        from_values[i] = at(from.values, cell * value_bytes);
        if (from.argmax != nullptr) from_argmaxes[i] = at(from.argmax, cell * argmax_bytes);
        indices[i] = static_cast<int32_t>(cell);
      }
      const int64_t tile = row * to.width + col;
      char* const value = at(values, tile * value_bytes);
      if (to.argmax == nullptr) {
        loops.max(from_values, 4, channels, false, value);
        continue;
      }
      char* const argmax = at(argmaxes, tile * argmax_bytes);
      if (level == 1) {
        loops.argmax(from_values, indices, 4, channels, false, value, argmax);
      } else {
        loops.merge(from_values, from_argmaxes, 4, channels, false, value, argmax);
      }
    }
  }
}

}  // namespace jax_roipool
