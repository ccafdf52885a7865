#include "pyramid.h"

#include <algorithm>
#include <new>

#include "memory.h"

namespace jax_roipool {
namespace {

// What tiles would do for one image.
struct Use {
  double saved = 0;  // reads of cells
  int64_t levels = 0;

  // Making the tiles took as long as it takes to read 2 to 8 times all cells.
  bool pays(const MapShape& map) const { return saved > 8.0 * map.cells(); }
};

void add_roi(Use& use, double bin_rows, double bin_cols, double rows, double cols) {
  // A bin of r x c cells reads about r + c of each size of tile, half as many as of the next.
  const double saved = rows * cols - 2 * (rows * bin_cols + cols * bin_rows);
  if (saved <= 0) return;
  use.saved += saved;
  const double side = std::min(rows / bin_rows, cols / bin_cols);
  while ((4 << use.levels) <= side) ++use.levels;
}

// Level `level`, in the rows that lie in a band of 2^(number of levels) cells.
void make_tiles(const ChannelLoops& loops, int64_t channels, const std::vector<Level>& levels,
                int64_t level, int64_t band) {
  const Level &from = levels[level - 1], &to = levels[level];
  const int64_t value_bytes = channels * loops.item_size;
  const int64_t argmax_bytes = channels * loops.argmax_size;
  const int64_t rows = int64_t{1} << (levels.size() - 1 - level);
  const int64_t end = std::min((band + 1) * rows, to.height);
  for (int64_t row = band * rows; row < end; ++row) {
    for (int64_t col = 0; col < to.width; ++col) {
      const void *cells[4], *argmaxes[4];
      int32_t indices[4];
      for (int i = 0; i < 4; ++i) {
        const int64_t cell = (2 * row + i / 2) * from.width + 2 * col + i % 2;
        cells[i] = at(from.values, cell * value_bytes);
        if (from.argmax != nullptr) argmaxes[i] = at(from.argmax, cell * argmax_bytes);
        indices[i] = static_cast<int32_t>(cell);
      }
      const int64_t tile = row * to.width + col;
      char* const value = const_cast<char*>(at(to.values, tile * value_bytes));
      if (to.argmax == nullptr) {
        loops.max(cells, 4, channels, false, value);
        continue;
      }
      char* const argmax = const_cast<char*>(at(to.argmax, tile * argmax_bytes));
      if (level == 1) {
        loops.argmax(cells, indices, 4, channels, false, value, argmax);
      } else {
        loops.merge(cells, argmaxes, 4, channels, false, value, argmax);
      }
    }
  }
}

}  // namespace

Pyramid::Pyramid(const ChannelLoops& loops, const MapShape& map, const PooledShape& shape,
                 const void* features, const Rectangles& rectangles, bool with_argmax,
                 const Threads& threads) {
  const int64_t images = map.groups * map.images;
  std::vector<Use> uses(images);
  for (int64_t roi = 0; roi < shape.groups * shape.rois; ++roi) {
    const int64_t image_index = rectangles.image_index[roi];
    if (image_index < 0 || image_index >= map.images) continue;
    double rows = 0, cols = 0;
    for (int64_t p = roi * shape.bin_rows; p < (roi + 1) * shape.bin_rows; ++p) {
      rows += rectangles.rows(p, map.height).size();
    }
    for (int64_t q = roi * shape.bin_cols; q < (roi + 1) * shape.bin_cols; ++q) {
      cols += rectangles.cols(q, map.width).size();
    }
    add_roi(uses[roi / shape.rois * map.images + image_index], shape.bin_rows, shape.bin_cols, rows,
            cols);
  }

  struct Band {
    int64_t image, index;
  };
  std::vector<Band> bands;
  images_.resize(images);
  for (int64_t image = 0; image < images; ++image) {
    std::vector<Level>& levels = images_[image];
    levels.push_back(
        {at(features, image * map.image_size() * loops.item_size), nullptr, map.height, map.width});
    const Use& use = uses[image];
    if (!use.pays(map) || !allocate_levels(loops, map.channels, use.levels, with_argmax, levels)) {
      continue;
    }
    const int64_t rows = int64_t{1} << use.levels;
    for (int64_t index = 0; index * rows < map.height; ++index) bands.push_back({image, index});
  }
  parallel_for(threads, bands.size(), [&](int64_t i) {
    const std::vector<Level>& levels = images_[bands[i].image];
    for (size_t level = 1; level < levels.size(); ++level) {
      make_tiles(loops, map.channels, levels, level, bands[i].index);
    }
  });
}

// False, and no levels, if there is not enough memory.
bool Pyramid::allocate_levels(const ChannelLoops& loops, int64_t channels, int64_t count,
                              bool with_argmax, std::vector<Level>& levels) {
  for (int64_t level = 1; level <= count; ++level) {
    const int64_t height = levels[0].height >> level, width = levels[0].width >> level;
    const int64_t values = height * width * channels * loops.item_size;
    const int64_t argmaxes = with_argmax ? height * width * channels * loops.argmax_size : 0;
    memory_.emplace_back(new (std::nothrow) char[values + argmaxes]);
    char* const memory = memory_.back().get();
    if (memory == nullptr) {
      levels.resize(1);
      return false;
    }
    prefer_huge_pages(memory, values + argmaxes);
    levels.push_back({memory, with_argmax ? memory + values : nullptr, height, width});
  }
  return true;
}

}  // namespace jax_roipool
