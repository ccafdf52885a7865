// What a call is about: the shapes of its arrays, and its rectangles.
#pragma once

#include <algorithm>
#include <cstdint>

namespace jax_roipool {

// Feature maps and their gradients: [num_groups, num_images, height, width, channels].
struct MapShape {
  int64_t num_groups, num_images, height, width, channels;

  int64_t cells() const { return height * width; }
  int64_t image_size() const { return cells() * channels; }
  // An index of an image in its group, or -1 if the group has no such image.
  int64_t image_index(int64_t index) const { return 0 <= index && index < num_images ? index : -1; }
};

// Maxima, argmaxes, tangents and cotangents: [num_groups, num_rois, bin_rows, bin_cols, channels].
struct PooledShape {
  int64_t num_groups, num_rois, bin_rows, bin_cols, channels;

  int64_t rois() const { return num_groups * num_rois; }
  int64_t bins() const { return bin_rows * bin_cols; }
  int64_t size() const { return rois() * bins() * channels; }
  // The place of a bin among those of all RoIs.
  int64_t bin(int64_t roi, int64_t row, int64_t col) const {
    return (roi * bin_rows + row) * bin_cols + col;
  }
  // Of each RoI in the array of edges.
  int64_t lanes() const { return 1 + 2 * bin_rows + 2 * bin_cols; }
};

struct Range {
  int64_t start, end;

  int64_t size() const { return end > start ? end - start : 0; }
};

// A view of packed edges, int32 [num_groups, num_rois, lanes]. The lanes of a RoI are the index of
// its image in its group, the first rows of its rows of bins, the rows after their last ones, the
// first columns of its columns of bins, and the columns after their last ones. Any int32 may come.
// `roi` counts the RoIs of all groups.
class Rectangles {
 public:
  Rectangles(const int32_t* edges, const MapShape& map, const PooledShape& shape)
      : edges_(edges), map_(map), shape_(shape) {}

  // -1 if the group has no such image.
  int64_t image_index(int64_t roi) const { return map_.image_index(edges_[roi * shape_.lanes()]); }

  // Rows and columns are kept inside the map, whatever the edges say.
  Range rows(int64_t roi, int64_t bin_row) const {
    return range(roi * shape_.lanes() + 1 + bin_row, shape_.bin_rows, map_.height);
  }
  Range cols(int64_t roi, int64_t bin_col) const {
    return range(roi * shape_.lanes() + 1 + 2 * shape_.bin_rows + bin_col, shape_.bin_cols,
                 map_.width);
  }

 private:
  Range range(int64_t start, int64_t bins, int64_t size) const {
    return {std::clamp<int64_t>(edges_[start], 0, size),
            std::clamp<int64_t>(edges_[start + bins], 0, size)};
  }

  const int32_t* edges_;
  MapShape map_;
  PooledShape shape_;
};

}  // namespace jax_roipool
