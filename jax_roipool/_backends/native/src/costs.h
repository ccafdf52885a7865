// What the ways to take the maxima of a row of bins cost, in the time that it takes to read a cell
// of a long run of cells. Fitted to times on two cores with AVX2: maps of 38 x 50 to 200 x 336
// cells of 16 to 512 channels, RoIs of 2 to 100 cells.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "loops.h"
#include "shapes.h"

namespace jax_roipool {

// The columns of a RoI's bins.
struct BinCols {
  std::vector<Range> of_bin;
  Range hull;         // from the first to the last of all bins
  int64_t bins, sum;  // how many bins have columns, and how many columns these have

  explicit BinCols(const PooledShape& shape) : of_bin(shape.bin_cols) {}

  void set(const Rectangles& rectangles, int64_t roi) {
    hull = {};
    bins = sum = 0;
    for (size_t bin = 0; bin < of_bin.size(); ++bin) {
      const Range cols = of_bin[bin] = rectangles.cols(roi, bin);
      if (cols.size() == 0) continue;
      hull =
          bins == 0 ? cols : Range{std::min(hull.start, cols.start), std::max(hull.end, cols.end)};
      ++bins;
      sum += cols.size();
    }
  }
};

class Costs {
 public:
  Costs(const MaximumLoops& loops, int64_t channels, bool with_argmax) {
    const int64_t lane =
        with_argmax ? std::max(loops.item_size, loops.argmax_size) : loops.item_size;
    const double bytes = static_cast<double>(std::max<int64_t>(channels * lane, 1));
    // Where elements are converted to wider lanes, that takes the time, and not reading them.
    strip_ = 0.8 + 0.2 * (lane / loops.item_size);
    cell_ = 1.6 * (1 + 24 / bytes);
    tile_ = 4 / strip_ * (1 + 64 / bytes);
    column_ = with_argmax ? 1.6 : 1;
  }

  // One bin after the other.
  double cells(double rows, const BinCols& cols) const { return cell_ * rows * cols.sum; }

  // Down the columns of all bins at once, and then over the columns of each bin.
  double strips(double rows, const BinCols& cols) const {
    return strip_ * ((rows + 2.5) * cols.hull.size() + column_ * cols.sum + cols.bins);
  }

  // One bin after the other from tiles: about r + c of each size for a bin of r x c cells, and half
  // as many of the next size.
  double tiles(double rows, const BinCols& cols) const {
    return tile_ * (rows * cols.bins + cols.sum);
  }

  // Of making the tiles, for each cell of the map.
  double making_tiles() const { return 2 * tile_; }

 private:
  double cell_, tile_, strip_, column_;
};

}  // namespace jax_roipool
