// The maximum of each bin, and its cell.
//
//   ITEMS             vectors of the result that a block makes
//   EMPTY_IS_LEAST    whether a bin without cells gives the least value, not 0
#include "maxima.cuh"

// The cells of a rectangle in row-major order. When there is none left, the last again.
class Cells {
 public:
  int remaining;

  __device__ Cells(int top, int bottom, int left, int right)
      : remaining((bottom - top) * (right - left)), cols_(right - left),
        at_(top * WIDTH + left), left_(cols_) {}
  __device__ int next() {
    const int at = at_;
    if (--remaining > 0) {
      ++at_;
      if (--left_ == 0) at_ += WIDTH - cols_, left_ = cols_;
    }
    return at;
  }

 private:
  int cols_, at_, left_;
};

// The next kCount, loaded at once and then compared: a maximum may see one twice.
template <int kCount>
__device__ inline void take(Maxima& maxima, const Elements* map, Cells& cells) {
  int at[kCount];
  Elements x[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) at[i] = cells.next();
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = map[OFFSET(at[i]) * kVectors];
#pragma unroll
  for (int i = 0; i < kCount; ++i) maxima.see_next(x[i], at[i]);
}

#if WINDOW
// Windows that cover a rectangle: one beside and below the other, the last ones reaching back over
// those before. When there is none left, the last again.
class Windows {
 public:
  bool remain = true;

  __device__ Windows(int top, int bottom, int left, int right)
      : left_(left), last_row_(bottom - WINDOW), last_col_(right - WINDOW), row_(top), col_(left) {}
  __device__ void next(int& row, int& col) {
    row = row_, col = col_;
    const bool is_last_col = col_ == last_col_;
    remain = !(is_last_col & (row_ == last_row_));
    if (!remain) return;
    row_ = is_last_col ? min(row_ + WINDOW, last_row_) : row_;
    col_ = is_last_col ? left_ : min(col_ + WINDOW, last_col_);
  }

 private:
  int left_, last_row_, last_col_, row_, col_;
};

// The next two.
__device__ inline void take(Maxima& maxima, const Elements* window_maxima,
                            const Places* window_places, Windows& windows) {
  int row[2], col[2];
  Elements x[2];
  Places places[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) windows.next(row[i], col[i]);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const OFFSET at = OFFSET(row[i] * kWindowCols + col[i]) * kVectors;
    x[i] = window_maxima[at];
    if (WITH_ARGMAX) places[i] = window_places[at];
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
      const int place = WITH_ARGMAX ? places[i].of[j] : 0;
      const int cell = (row[i] + place / WINDOW) * WIDTH + col[i] + place % WINDOW;
      maxima.see(j, Element::load(x[i].of[j]), cell);
    }
  }
}
#endif

__device__ inline int inside(int x, int size) { return min(max(x, 0), size); }

extern "C" __global__ void __launch_bounds__(THREADS, kBlocksAtOnce)
KERNEL(const Elements* __restrict__ features, const int* __restrict__ edges,
#if WINDOW
       const int* __restrict__ windows_are_used, const Elements* __restrict__ window_maxima,
#if WITH_ARGMAX
       const Places* __restrict__ window_places,
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
    const Edges<1> its{edges + Long(roi) * kLanes};
    const int image = its.image();
    // Whatever edges say, nothing outside of a map is ever read.
    const int top = inside(its.row_start(p), HEIGHT), bottom = inside(its.row_end(p), HEIGHT);
    const int left = inside(its.col_start(q), WIDTH), right = inside(its.col_end(q), WIDTH);

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
      maxima.start(top * WIDTH + left);
#if WINDOW
      if (*windows_are_used && bottom - top >= WINDOW && right - left >= WINDOW) {
        const Long of_image = image_of_all * kWindows * kVectors + vector;
#if WITH_ARGMAX
        const Places* places = window_places + of_image;
#else
        const Places* places = nullptr;
#endif
        Windows windows(top, bottom, left, right);
        while (windows.remain) take(maxima, window_maxima + of_image, places, windows);
      } else
#endif
      {
        const Elements* map = features + image_of_all * kCells * kVectors + vector;
        Cells cells(top, bottom, left, right);
        while (cells.remaining > 2) take<4>(maxima, map, cells);
        while (cells.remaining > 0) take<2>(maxima, map, cells);
      }
    }
    pooled[item] = maxima.values();
#if WITH_ARGMAX
    argmax[item] = maxima.cells();
#endif
  }
}
