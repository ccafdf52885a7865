#include "weighted_sum.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "memory.h"

namespace jax_roipool {
namespace {

// The taps of one RoI, or of a row of its bins, for one thread after the other.
class Scratch {
 public:
  Scratch(const BinTaps& bins, const PooledShape& shape, int64_t workers)
      : bins_(bins),
        shape_(shape),
        taps_(bins.taps_of_a_row() + shape.bin_cols * bins.taps_of_a_column()),
        memory_(workers * taps_),
        columns_(workers * shape.bin_cols) {}

  Taps row(int64_t worker, int64_t roi, int64_t bin_row, Range wanted) {
    return bins_.row_taps(roi, bin_row, wanted, memory_.data() + worker * taps_);
  }

  // Of each column of bins.
  const Taps* columns(int64_t worker, int64_t roi) {
    Taps* const columns = columns_.data() + worker * shape_.bin_cols;
    Tap* found = memory_.data() + worker * taps_ + bins_.taps_of_a_row();
    for (int64_t q = 0; q < shape_.bin_cols; ++q) {
      columns[q] = bins_.column_taps(roi, q, found);
      found += columns[q].count;
    }
    return columns;
  }

 private:
  const BinTaps& bins_;
  const PooledShape& shape_;
  const int64_t taps_;
  std::vector<Tap> memory_;
  std::vector<Taps> columns_;
};

}  // namespace

Taps BinTaps::taps(const AxisTaps& axis, int64_t roi, int64_t bin, Range wanted, Tap* found) const {
  const int32_t* const lanes = cells_ + roi * lanes_;
  const int32_t* const first = lanes + axis.first + bin * axis.runs;
  const float* const weights = axis.weights + (roi * axis.bins + bin) * axis.taps;
  const int64_t used = std::min<int64_t>(lanes[axis.count], axis.taps);
  int64_t count = 0;
  const int64_t run = axis.runs == 0 ? 0 : axis.taps / axis.runs;
  for (int64_t begin = 0; begin < used; begin += run) {
    const int64_t start = first[begin / run], end = std::min(begin + run, used);
    for (int64_t t = begin; t < end; ++t) {
      if (weights[t] == 0) continue;
      // Of an axis without cells it is 0, which is not wanted.
      const int64_t cell = std::max<int64_t>(std::min(start + t - begin, axis.size - 1), 0);
      if (cell < wanted.start || cell >= wanted.end) continue;
      found[count++] = {cell * axis.stride, weights[t]};
    }
  }
  return {found, count};
}

void weighted_sum(const SumLoops& loops, const MapShape& map, const PooledShape& shape,
                  const void* features, const BinTaps& bins, const void* onto, void* pooled,
                  const Threads& threads) {
  if (shape.size() == 0) return;
  const int64_t bin_bytes = shape.channels * loops.item_size;
  prefer_huge_pages(pooled, shape.size() * loops.item_size);

  Scratch scratch(bins, shape, workers_on_bins(threads, shape));
  parallel_for_bins(threads, shape, [&](int64_t roi, Range bin_rows, int64_t worker) {
    const int64_t image_index = bins.image_index(roi);
    if (image_index < 0) {
      const int64_t first_bin = shape.bin(roi, bin_rows.start, 0);
      const int64_t bytes = bin_rows.size() * shape.bin_cols * bin_bytes;
      zero_or_keep(onto, pooled, first_bin * bin_bytes, bytes);
      return;
    }
    const auto pooled_of = [&](int64_t bin_row, int64_t bin_col) {
      return at(pooled, shape.bin(roi, bin_row, bin_col) * bin_bytes);
    };
    const int64_t image = roi / shape.num_rois * map.num_images + image_index;
    const void* const cells = at(features, image * map.image_size() * loops.item_size);
    const Taps* const columns = scratch.columns(worker, roi);
    for (int64_t bin_row = bin_rows.start; bin_row < bin_rows.end; ++bin_row) {
      const Taps rows = scratch.row(worker, roi, bin_row, {0, map.height});
      for (int64_t bin_col = 0; bin_col < shape.bin_cols; ++bin_col) {
        loops.sum(cells, rows, columns[bin_col], shape.channels, pooled_of(bin_row, bin_col));
      }
    }
  });
}

void weighted_scatter(const SumLoops& loops, const MapShape& map, const PooledShape& shape,
                      const void* cotangent, const BinTaps& bins, void* gradient,
                      const Threads& threads) {
  const int64_t num_images = map.num_groups * map.num_images;
  if (num_images * map.image_size() == 0) return;
  const int64_t bytes = num_images * map.image_size() * loops.sum_size;
  prefer_huge_pages(gradient, bytes);
  if (shape.size() == 0) {  // no bins, which may have more taps than there is memory for
    std::memset(gradient, 0, bytes);
    return;
  }

  // Threads share out the images, and then their rows, so that no two threads write to one cell.
  // Some bands have more to be added to than others, so there are several for a thread.
  constexpr int64_t kBandsOfAThread = 4;
  const int64_t wanted = threads.count == 1 ? 1 : kBandsOfAThread * threads.count;
  const int64_t bands = std::clamp<int64_t>((wanted + num_images - 1) / num_images, 1, map.height);
  const int64_t row_bytes = map.width * map.channels * loops.sum_size;

  Scratch scratch(bins, shape, threads.workers(num_images * bands));
  parallel_for(threads, num_images * bands, [&](int64_t task, int64_t worker) {
    const int64_t image = task / bands, band = task % bands, group = image / map.num_images;
    const Range mine = {band * map.height / bands, (band + 1) * map.height / bands};
    void* const sums = at(gradient, image * map.image_size() * loops.sum_size);
    std::memset(at(sums, mine.start * row_bytes), 0, mine.size() * row_bytes);
    for (int64_t roi = group * shape.num_rois; roi < (group + 1) * shape.num_rois; ++roi) {
      if (bins.image_index(roi) != image % map.num_images) continue;
      const Taps* columns = nullptr;
      for (int64_t bin_row = 0; bin_row < shape.bin_rows; ++bin_row) {
        const Taps rows = scratch.row(worker, roi, bin_row, mine);
        if (rows.count == 0) continue;
        if (columns == nullptr) columns = scratch.columns(worker, roi);
        for (int64_t bin_col = 0; bin_col < shape.bin_cols; ++bin_col) {
          const int64_t bin = shape.bin(roi, bin_row, bin_col);
          loops.scatter(at(cotangent, bin * shape.channels * loops.item_size), rows,
                        columns[bin_col], shape.channels, sums);
        }
      }
    }
  });
}

}  // namespace jax_roipool
