#include "rectangle_max.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "costs.h"
#include "memory.h"
#include "pyramid.h"
#include "strips.h"

namespace jax_roipool {
namespace {

// The maximum of one bin, from the cells and tiles that make it up.
class Bin {
 public:
  Bin(const MaximumLoops& loops, int64_t channels, const std::vector<Level>& levels, void* pooled,
      void* argmax)
      : loops_(loops), channels_(channels), levels_(levels), pooled_(pooled), argmax_(argmax) {}

  // Takes the tiles of a level in these rows and columns, which are not empty.
  void add(size_t level, Range rows, Range cols) {
    // The tiles of the next level that lie inside.
    const Range inner_rows = {(rows.start + 1) / 2, rows.end / 2};
    const Range inner_cols = {(cols.start + 1) / 2, cols.end / 2};
    if (level + 1 == levels_.size() || inner_rows.size() == 0 || inner_cols.size() == 0) {
      for (int64_t row = rows.start; row < rows.end; ++row) add_row(level, row, cols);
    } else {
      for (int64_t row = rows.start; row < rows.end; ++row) {
        if (row / 2 < inner_rows.start || row / 2 >= inner_rows.end) {
          add_row(level, row, cols);
        } else {
          add_row(level, row, {cols.start, 2 * inner_cols.start});
          add_row(level, row, {2 * inner_cols.end, cols.end});
        }
      }
      flush(level);
      add(level + 1, inner_rows, inner_cols);
    }
    flush(level);
  }

 private:
  static constexpr int64_t kCells = 64;

  void add_row(size_t level, int64_t row, Range cols) {
    const Level& tiles = levels_[level];
    for (int64_t col = cols.start; col < cols.end; ++col) {
      const int64_t cell = row * tiles.width + col;
      cells_[count_] = at(tiles.values, cell * channels_ * loops_.item_size);
      indices_[count_] = static_cast<int32_t>(cell);
      if (tiles.argmax != nullptr) {
        argmaxes_[count_] = at(tiles.argmax, cell * channels_ * loops_.argmax_size);
      }
      if (++count_ == kCells) flush(level);
    }
  }

  void flush(size_t level) {
    if (count_ == 0) return;
    if (argmax_ == nullptr) {
      loops_.max(cells_, count_, channels_, resume_, pooled_);
    } else if (level == 0) {
      loops_.argmax(cells_, indices_, count_, channels_, resume_, pooled_, argmax_);
    } else {
      loops_.merge(cells_, argmaxes_, count_, channels_, resume_, pooled_, argmax_);
    }
    resume_ = true;
    count_ = 0;
  }

  const MaximumLoops& loops_;
  const int64_t channels_;
  const std::vector<Level>& levels_;
  void *const pooled_, *const argmax_;

  bool resume_ = false;
  int64_t count_ = 0;
  const void *cells_[kCells], *argmaxes_[kCells];
  int32_t indices_[kCells];
};

// Another thread takes as long to wake as this one to read so much.
constexpr int64_t kWorthWaking = 128 << 10;

bool is_worth_waking(const MaximumLoops& loops, const PooledShape& shape,
                     const Rectangles& rectangles) {
  const int64_t elements = kWorthWaking / loops.item_size;
  if (shape.size() >= elements) return true;
  int64_t cells = 0;
  for (int64_t roi = 0; roi < shape.rois(); ++roi) {
    if (rectangles.image_index(roi) < 0) continue;
    int64_t rows = 0, cols = 0;
    for (int64_t i = 0; i < shape.bin_rows; ++i) rows += rectangles.rows(roi, i).size();
    for (int64_t i = 0; i < shape.bin_cols; ++i) cols += rectangles.cols(roi, i).size();
    cells += rows * cols;
  }
  return cells * shape.channels >= elements;
}

bool prefers_strips(const Costs& costs, Range rows, const BinCols& cols, bool has_tiles) {
  const double cells = costs.cells(rows.size(), cols), tiles = costs.tiles(rows.size(), cols);
  return costs.strips(rows.size(), cols) < (has_tiles ? std::min(cells, tiles) : cells);
}

}  // namespace

void rectangle_max(const MaximumLoops& loops, const MapShape& map, const PooledShape& shape,
                   const void* features, const Rectangles& rectangles, bool empty_is_lowest,
                   const void* onto, void* pooled, void* argmax, const Threads& all_threads) {
  if (shape.size() == 0) return;
  const Threads threads = is_worth_waking(loops, shape, rectangles) ? all_threads : Threads{1, {}};
  const bool with_argmax = argmax != nullptr;
  const int64_t pooled_bytes = shape.channels * loops.item_size;
  const int64_t argmax_bytes = shape.channels * loops.argmax_size;
  prefer_huge_pages(pooled, shape.rois() * shape.bins() * pooled_bytes);
  if (with_argmax) prefer_huge_pages(argmax, shape.rois() * shape.bins() * argmax_bytes);

  const int64_t workers = workers_on_bins(threads, shape);
  const Costs costs(loops, map.channels, with_argmax);
  const Pyramid pyramid(loops, map, shape, features, rectangles, with_argmax, costs, threads);
  Strips strips(loops, map, with_argmax, workers);
  std::vector<BinCols> cols_of(workers, BinCols(shape));
  parallel_for_bins(threads, shape, [&](int64_t roi, Range bin_rows, int64_t worker) {
    const int64_t image_index = rectangles.image_index(roi);
    if (image_index < 0) {
      const int64_t first_bin = shape.bin(roi, bin_rows.start, 0);
      const int64_t bins = bin_rows.size() * shape.bin_cols;
      zero_or_keep(onto, pooled, first_bin * pooled_bytes, bins * pooled_bytes);
      if (with_argmax) {
        std::memset(at(argmax, first_bin * argmax_bytes), 0xFF, bins * argmax_bytes);  // -1
      }
      return;
    }
    const int64_t image = roi / shape.num_rois * map.num_images + image_index;
    BinCols& cols = cols_of[worker];
    cols.set(rectangles, roi);

    for (int64_t bin_row = bin_rows.start; bin_row < bin_rows.end; ++bin_row) {
      const int64_t first_bin = shape.bin(roi, bin_row, 0);
      const auto pooled_of = [&](int64_t col) {
        return at(pooled, (first_bin + col) * pooled_bytes);
      };
      const auto argmax_of = [&](int64_t col) -> void* {
        return with_argmax ? at(argmax, (first_bin + col) * argmax_bytes) : nullptr;
      };
      const Range rows = rectangles.rows(roi, bin_row);
      const bool has_rows = rows.size() > 0;
      const bool by_strips =
          has_rows && prefers_strips(costs, rows, cols, pyramid.has_tiles(image));
      if (by_strips) {
        const void* const cells = at(features, image * map.image_size() * loops.item_size);
        strips.pool(worker, cells, rows, cols, pooled_of(0), argmax_of(0));
      }
      for (int64_t col = 0; col < shape.bin_cols; ++col) {
        const Range bin_cols = cols.of_bin[col];
        if (has_rows && bin_cols.size() > 0) {
          if (!by_strips) {
            Bin(loops, map.channels, pyramid.levels(image), pooled_of(col), argmax_of(col))
                .add(0, rows, bin_cols);
          }
          continue;
        }
        if (empty_is_lowest) {
          loops.fill_lowest(shape.channels, pooled_of(col));
        } else {
          std::memset(pooled_of(col), 0, pooled_bytes);
        }
        if (with_argmax) std::memset(argmax_of(col), 0xFF, argmax_bytes);  // -1
      }
    }
  });
}

void gather_at_argmax(const MaximumLoops& loops, const MapShape& map, const PooledShape& shape,
                      const void* features, const void* argmax, const Rectangles& rectangles,
                      void* tangent, const Threads& threads) {
  const int64_t channels = shape.channels, bin_bytes = channels * loops.item_size;
  prefer_huge_pages(tangent, shape.size() * loops.item_size);
  parallel_for(threads, shape.num_groups * shape.num_rois, [&](int64_t roi, int64_t) {
    const int64_t image_index = rectangles.image_index(roi), group = roi / shape.num_rois;
    const int64_t image = group * map.num_images + std::max<int64_t>(image_index, 0);
    const int64_t cells = image_index < 0 ? 0 : map.cells();  // no argmax is one of no cells
    for (int64_t bin = roi * shape.bins(); bin < (roi + 1) * shape.bins(); ++bin) {
      loops.gather(at(features, image * map.image_size() * loops.item_size),
                   at(argmax, bin * channels * loops.argmax_size), cells, channels,
                   at(tangent, bin * bin_bytes));
    }
  });
}

// Page after page, each by one thread: the system makes zeros of a fresh page for every thread that
// waits for it, which takes longer than writing there.
static void zero(void* array, int64_t bytes, const Threads& threads) {
  constexpr intptr_t kPage = 2 << 20;
  prefer_huge_pages(array, bytes);
  const intptr_t start = reinterpret_cast<intptr_t>(array), end = start + bytes;
  const int64_t pages = (end - 1) / kPage - start / kPage + 1;
  parallel_for(threads, pages, [&](int64_t i, int64_t) {
    const intptr_t page = (start / kPage + i) * kPage, from = std::max(page, start);
    std::memset(at(array, from - start), 0, std::min(page + kPage, end) - from);
  });
}

void scatter_at_argmax(const MaximumLoops& loops, const MapShape& map, const PooledShape& shape,
                       const void* cotangent, const void* argmax, const Rectangles& rectangles,
                       void* gradient, const Threads& threads) {
  const int64_t channels = map.channels, num_images = map.num_groups * map.num_images;
  const int64_t bins = shape.num_groups * shape.num_rois * shape.bins();
  if (num_images * map.image_size() == 0) return;
  zero(gradient, num_images * map.image_size() * loops.sum_size, threads);

  // Threads share out the images, and then the channels, so that no two threads write to one cell.
  // There are as few blocks of channels as keep the threads busy, since what is read from end to
  // end is read fastest.
  const int64_t parts = std::max<int64_t>(1, (threads.count + num_images - 1) / num_images);
  const int64_t unit = kCacheLine / loops.sum_size;
  const int64_t block = ((channels + parts - 1) / parts + unit - 1) / unit * unit;
  const int64_t blocks = (channels + block - 1) / block;
  // Where a thread reads a part of each bin only, the processor does not see what comes next.
  constexpr int64_t kBinsAhead = 8;

  parallel_for(threads, num_images * blocks, [&](int64_t task, int64_t) {
    const int64_t image = task / blocks, group = image / map.num_images;
    const int64_t channel = task % blocks * block, count = std::min(block, channels - channel);
    const auto cotangent_of = [&](int64_t bin) {
      return at(cotangent, (bin * channels + channel) * loops.item_size);
    };
    const auto argmax_of = [&](int64_t bin) {
      return at(argmax, (bin * channels + channel) * loops.argmax_size);
    };
    void* const sums = at(gradient, (image * map.image_size() + channel) * loops.sum_size);
    for (int64_t roi = group * shape.num_rois; roi < (group + 1) * shape.num_rois; ++roi) {
      if (rectangles.image_index(roi) != image % map.num_images) continue;
      for (int64_t bin = roi * shape.bins(); bin < (roi + 1) * shape.bins(); ++bin) {
        if (blocks > 1 && bin + kBinsAhead < bins) {
          prefetch(cotangent_of(bin + kBinsAhead), count * loops.item_size);
          prefetch(argmax_of(bin + kBinsAhead), count * loops.argmax_size);
        }
        loops.scatter(cotangent_of(bin), argmax_of(bin), map.cells(), count, channels, sums);
      }
    }
  });
}

}  // namespace jax_roipool
