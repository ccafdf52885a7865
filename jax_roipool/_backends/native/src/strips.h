// Maxima of so few channels that a cell fills no vector: first down the columns of a row of bins,
// for all its columns and channels at once, then over the columns of each bin.
#pragma once

#include <cstdint>
#include <vector>

#include "loops.h"
#include "shapes.h"

namespace jax_roipool {

class Strips {
 public:
  Strips(const MaximumLoops& loops, const MapShape& map, bool with_argmax, int64_t workers);

  // Whether they are at least as fast as one bin after the other, as measured with AVX2: at up to 8
  // channels of float32 or of any type with argmaxes, and up to 32 of int8.
  static bool serve(const MaximumLoops& loops, int64_t channels, bool with_argmax);

  // Takes the maxima of a row of bins, of these rows, which are not empty, and these columns. Bins
  // without columns are left as they are. `argmax` is null if there are none.
  void pool(int64_t worker, const void* image, Range rows, const std::vector<Range>& cols,
            void* pooled, void* argmax);

 private:
  void fill(int64_t worker, const void* image, Range rows, Range cols);
  void* value(int64_t worker, int64_t col);
  void* row(int64_t worker, int64_t col);

  const MaximumLoops& loops_;
  const MapShape& map_;
  const int64_t value_bytes_, row_bytes_;
  // Of each worker and each column of the map, the maximum of its channels, and the rows of these.
  std::vector<char> values_, rows_;
};

}  // namespace jax_roipool
