// The maximum of each bin, and its cell.
//
//   ITEMS             vectors of the result that a block makes
//   EMPTY_IS_LEAST    whether a bin without cells gives the least value, not 0
#include "maxima.cuh"

// A rectangle of cells, or of tiles, in row-major order.
class Walk {
 public:
  int remaining;

  __device__ Walk(int width, int row_start, int row_end, int col_start, int col_end)
      : remaining((row_end - row_start) * (col_end - col_start)),
        width_(width), cols_(col_end - col_start), at_(row_start * width + col_start),
        left_(cols_) {}
  // The next, and when there is none the last again.
  __device__ int next() {
    const int at = at_;
    if (--remaining > 0) {
      ++at_;
      if (--left_ == 0) at_ += width_ - cols_, left_ = cols_;
    }
    return at;
  }

 private:
  int width_, cols_, at_, left_;
};

// The next kCount, loaded at once and then compared: a maximum may see one twice. `cells` is null
// where the values are those of cells.
template <int kCount, bool kInOrder>
__device__ inline void take(Maxima& maxima, const Elements* values, const Indices* cells,
                            Walk& walk) {
  int at[kCount];
  Elements x[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) at[j] = walk.next();
#pragma unroll
  for (int j = 0; j < kCount; ++j) x[j] = values[OFFSET(at[j]) * kVectors];
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if (kInOrder) {
      maxima.see_next(x[j], at[j]);
      continue;
    }
    Indices cell;
    if (cells != nullptr) cell = cells[OFFSET(at[j]) * kVectors];
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      maxima.see(i, Element::load(x[j].of[i]), cells == nullptr ? at[j] : cell.of[i]);
    }
  }
}

template <bool kInOrder>
__device__ inline void take_all(Maxima& maxima, const Elements* values, const Indices* cells,
                                Walk walk) {
  // Tiles have cells beside them: four of both would take too many registers.
  while (kInOrder && walk.remaining > 2) take<4, kInOrder>(maxima, values, cells, walk);
  while (walk.remaining > 0) take<2, kInOrder>(maxima, values, cells, walk);
}

#if LEVELS
// The cells of a large rectangle: the tiles of the highest level that lie inside, and around them
// those of each level below.
__device__ inline void take_tiles(Maxima& maxima, const Elements* map, const Elements* tile_maxima,
                                  const Indices* tile_cells, Long image, int top, int bottom,
                                  int left, int right) {
  const Elements* values = map;
  const Indices* cells = nullptr;
  for (int level = 0;; ++level) {
    // The tiles of the next level that lie inside of these.
    const int inner_top = (top + 1) / 2, inner_bottom = bottom / 2;
    const int inner_left = (left + 1) / 2, inner_right = right / 2;
    const bool is_last =
        level == LEVELS || inner_top >= inner_bottom || inner_left >= inner_right;
    // Above, below, left and right of them; or all. One call: the loops in it take registers.
    for (int side = 0; side < (is_last ? 1 : 4); ++side) {
      const int t = side == 0 ? top : side == 1 ? 2 * inner_bottom : 2 * inner_top;
      const int b = is_last || side == 1 ? bottom : side == 0 ? 2 * inner_top : 2 * inner_bottom;
      const int l = side == 3 ? 2 * inner_right : left;
      const int r = side == 2 ? 2 * inner_left : right;
      if (t >= b || l >= r) continue;
      take_all<false>(maxima, values, cells, Walk(WIDTH >> level, t, b, l, r));
    }
    if (is_last) return;
    top = inner_top, bottom = inner_bottom, left = inner_left, right = inner_right;
    const Long at = first_tile(level + 1, image) * kVectors;
    values = tile_maxima + at;
    if (WITH_ARGMAX) cells = tile_cells + at;
  }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, kBlocksAtOnce)
KERNEL(const Elements* __restrict__ features, const int* __restrict__ edges,
#if LEVELS
       const int* __restrict__ tiles_are_used, const Elements* __restrict__ tile_maxima,
#if WITH_ARGMAX
       const Indices* __restrict__ tile_cells,
#endif
#endif
       Elements* __restrict__ pooled
#if WITH_ARGMAX
       , Indices* __restrict__ argmax
#endif
) {
  constexpr COUNT kTotal = COUNT(GROUPS) * ROIS * BIN_ROWS * BIN_COLS * kVectors;
  const COUNT first = COUNT(blockIdx.x) * ITEMS, end = min(first + ITEMS, kTotal);
  for (COUNT item = first + threadIdx.x; item < end; item += THREADS) {
    const int vector = item % kVectors;
    const COUNT bin = item / kVectors, roi = bin / (BIN_ROWS * BIN_COLS);
    const int p = bin / BIN_COLS % BIN_ROWS, q = bin % BIN_COLS;
    const Edges roi_edges(edges, roi);
    const int image = roi_edges.image();
    const int top = roi_edges.row_start(p), bottom = roi_edges.row_end(p);
    const int left = roi_edges.col_start(q), right = roi_edges.col_end(q);

    Maxima maxima;
    if (image < 0 || image >= IMAGES) {
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) maxima.value[i] = 0, maxima.cell[i] = -1;
    } else if (top >= bottom || left >= right) {
      maxima.start(-1);
#pragma unroll
      for (int i = 0; i < VECTOR && !EMPTY_IS_LEAST; ++i) maxima.value[i] = 0;
    } else {
      const Long image_of_all = Long(roi / ROIS) * IMAGES + image;
      const Elements* map = features + image_of_all * kCells * kVectors + vector;
      maxima.start(top * WIDTH + left);
#if LEVELS
#if !WITH_ARGMAX
      constexpr const Indices* tile_cells = nullptr;
#endif
      if (*tiles_are_used && bottom - top > 3 && right - left > 3) {
        take_tiles(maxima, map, tile_maxima + vector, WITH_ARGMAX ? tile_cells + vector : nullptr,
                   image_of_all, top, bottom, left, right);
      } else
#endif
      {
        take_all<true>(maxima, map, nullptr, Walk(WIDTH, top, bottom, left, right));
      }
    }
    pooled[item] = maxima.values();
#if WITH_ARGMAX
    argmax[item] = maxima.cells();
#endif
  }
}
