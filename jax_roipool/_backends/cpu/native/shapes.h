// What a call is about: the shapes of its arrays, and its rectangles.
#pragma once

#include <algorithm>
#include <cstdint>

namespace jax_roipool {

// [groups, images, height, width, channels]
struct MapShape {
  int64_t groups, images, height, width, channels;

  int64_t cells() const { return height * width; }
  int64_t image_size() const { return cells() * channels; }
};

// [groups, rois, bin_rows, bin_cols, channels]
struct PooledShape {
  int64_t groups, rois, bin_rows, bin_cols, channels;

  int64_t bins() const { return bin_rows * bin_cols; }
};

struct Range {
  int64_t start, end;

  int64_t size() const { return end > start ? end - start : 0; }
};

struct Rectangles {
  const int32_t* image_index;          // [groups, rois]
  const int32_t *row_start, *row_end;  // [groups, rois, bin_rows]
  const int32_t *col_start, *col_end;  // [groups, rois, bin_cols]

  // Kept inside the map, whatever they say.
  Range rows(int64_t bin_row, int64_t height) const {
    return {std::clamp<int64_t>(row_start[bin_row], 0, height),
            std::clamp<int64_t>(row_end[bin_row], 0, height)};
  }
  Range cols(int64_t bin_col, int64_t width) const {
    return {std::clamp<int64_t>(col_start[bin_col], 0, width),
            std::clamp<int64_t>(col_end[bin_col], 0, width)};
  }
};

}  // namespace jax_roipool
