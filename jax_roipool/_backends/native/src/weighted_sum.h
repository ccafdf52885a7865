// The two primitives of the averages on plain memory: what is done for each RoI, and how threads
// share the work.
//
// Features and gradient are [num_groups, num_images, height, width, channels], pooled and cotangent
// [num_groups, num_rois, bin_rows, bin_cols, channels]. The result of a RoI without an image is 0,
// or what it is in `onto`, if that is given; its cotangent goes nowhere.
#pragma once

#include "loops.h"
#include "parallel.h"
#include "shapes.h"

namespace jax_roipool {

// A view of taps along the rows or the columns of bins: runs of cells, and a weight for each of
// them.
struct AxisTaps {
  const float* weights;  // [num_groups * num_rois, bins, taps]
  int64_t bins, taps;
  int64_t runs;          // of a bin, of equal length
  int64_t first, count;  // lanes of a RoI's cells: the first cell of the first run, how many count
  int64_t size;          // of the map
  int64_t stride;        // of the map, in elements
};

// What `cells` are is said in jax_roipool/_backends/weighted_sum. Any int32 may come.
class BinTaps {
 public:
  BinTaps(const int32_t* cells, int64_t lanes, const MapShape& map, AxisTaps rows, AxisTaps columns)
      : cells_(cells), lanes_(lanes), map_(map), rows_(rows), columns_(columns) {}

  // -1 if the group has no such image. `roi` counts the RoIs of all groups.
  int64_t image_index(int64_t roi) const { return map_.image_index(cells_[roi * lanes_]); }

  // Those with a weight, in order, of the rows or columns of the map that are wanted. `found` has
  // place for all.
  Taps row_taps(int64_t roi, int64_t bin, Range wanted, Tap* found) const {
    return taps(rows_, roi, bin, wanted, found);
  }
  Taps column_taps(int64_t roi, int64_t bin, Tap* found) const {
    return taps(columns_, roi, bin, {0, columns_.size}, found);
  }

  int64_t taps_of_a_row() const { return rows_.taps; }
  int64_t taps_of_a_column() const { return columns_.taps; }

 private:
  Taps taps(const AxisTaps& axis, int64_t roi, int64_t bin, Range wanted, Tap* found) const;

  const int32_t* cells_;
  int64_t lanes_;
  MapShape map_;
  AxisTaps rows_, columns_;
};

void weighted_sum(const SumLoops& loops, const MapShape& map, const PooledShape& shape,
                  const void* features, const BinTaps& bins, const void* onto, void* pooled,
                  const Threads& threads);

// `gradient` is of the type that sums are in. Every sum is in the order of RoIs, bins and taps,
// whatever the number of threads.
void weighted_scatter(const SumLoops& loops, const MapShape& map, const PooledShape& shape,
                      const void* cotangent, const BinTaps& bins, void* gradient,
                      const Threads& threads);

}  // namespace jax_roipool
