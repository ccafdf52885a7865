// Maxima of a row of bins, taken first down its columns, for all columns and channels at once, and
// then over the columns of each bin. Long runs of cells are read fastest, columns of several bins
// are read once, and so few channels that a cell fills no vector fill many together.
#pragma once

#include <cstdint>
#include <memory>

#include "costs.h"
#include "loops.h"
#include "shapes.h"

namespace jax_roipool {

class Strips {
 public:
  Strips(const MaximumLoops& loops, const MapShape& map, bool with_argmax, int64_t workers);

  // Takes the maxima of a row of bins, of these rows and columns, which are not empty. Bins without
  // columns are left as they are. `argmax` is null if there are none.
  void pool(int64_t worker, const void* image, Range rows, const BinCols& cols, void* pooled,
            void* argmax);

 private:
  void fill(int64_t worker, const void* image, Range rows, Range cols);
  void* value(int64_t worker, int64_t col);
  void* row(int64_t worker, int64_t col);

  const MaximumLoops& loops_;
  const MapShape& map_;
  const int64_t value_bytes_, row_bytes_;
  // Of each worker and each column of the map, the maximum of its channels, and the rows of these.
  std::unique_ptr<char[]> values_, rows_;
};

}  // namespace jax_roipool
