// The gradient: each cotangent added at its argmax, in the order of RoIs and bins, so that the sums
// are the same bits every time.
//
//   TILE_ROWS TILE_COLS   cells of a map that a block, which is one warp, owns
//   SUM                   float or double
#include "elements.cuh"

constexpr int kWarp = 32;
constexpr int kSlices = (kVectors + kWarp - 1) / kWarp;  // of the channels, a warp's each
constexpr int kTileRows = (HEIGHT - 1) / TILE_ROWS + 1, kTileCols = (WIDTH - 1) / TILE_COLS + 1;
constexpr int kListed = 256, kAtOnce = 8;
static_assert(THREADS == kWarp, "a warp works alone");

// The bins along one axis that meet the tile: from the first to the last that does, those between
// included. `starts` do not decrease, and but for empty bins `ends` do not.
struct Meeting {
  int first = 0, end = 0;

  template <class Start, class End>
  __device__ Meeting(int bins, int tile, int tile_end, Start start, End end_of) {
    // A bin reaches one cell into the next at most: an empty one at the end hides no more.
    if (start(0) >= tile_end || end_of(bins - 1) < tile) return;
    for (int i = 0; i < bins; ++i) {
      if (start(i) >= tile_end || end_of(i) <= tile || start(i) >= end_of(i)) continue;
      if (end == 0) first = i;
      end = i + 1;
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS)
KERNEL(const Elements* __restrict__ cotangent, const Indices* __restrict__ argmax,
       const int* __restrict__ edges, Elements* __restrict__ gradient) {
  __shared__ SUM sums[TILE_ROWS * TILE_COLS * VECTOR * kWarp];  // a bank a lane
  __shared__ int list[kListed];  // of bins of the group that meet the tile
  const int lane = threadIdx.x;
  int block = blockIdx.x;
  const int vector = block % kSlices * kWarp + lane;
  block /= kSlices;
  const int left = block % kTileCols * TILE_COLS;
  block /= kTileCols;
  const int top = block % kTileRows * TILE_ROWS, map = block / kTileRows;
  const int group = map / IMAGES, image = map % IMAGES;
  const bool has_vector = kVectors % kWarp == 0 || vector < kVectors;
  for (int i = 0; i < TILE_ROWS * TILE_COLS * VECTOR; ++i) sums[i * kWarp + lane] = 0;

  int listed = 0;
  const auto add_listed = [&] {
    __syncwarp();
    for (int first = 0; first < listed; first += kAtOnce) {
      Elements values[kAtOnce];
      Indices cells[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (first + j < listed && has_vector) {
          const Long bin = Long(group) * ROIS * BIN_ROWS * BIN_COLS + list[first + j];
          values[j] = cotangent[bin * kVectors + vector];
          cells[j] = argmax[bin * kVectors + vector];
        } else {
#pragma unroll
          for (int i = 0; i < VECTOR; ++i) cells[j].of[i] = -1;
        }
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
          const unsigned cell = int(cells[j].of[i]), row = cell / WIDTH;  // of -1: far below
          const unsigned y = row - top, x = cell - row * WIDTH - left;
          if (y < TILE_ROWS && x < TILE_COLS) {
            sums[((y * TILE_COLS + x) * VECTOR + i) * kWarp + lane] +=
                Element::load(values[j].of[i]);
          }
        }
      }
    }
    __syncwarp();
    listed = 0;
  };

  for (int base = 0; base < ROIS; base += kWarp) {
    // Each lane looks at one RoI.
    const int k = base + lane;
    int rows = 0, cols = 0;  // first << 16 | end
    if (k < ROIS) {
      const Edges roi(edges, Long(group) * ROIS + k);
      if (roi.image() == image) {
        const Meeting p(BIN_ROWS, top, top + TILE_ROWS, [&](int i) { return roi.row_start(i); },
                        [&](int i) { return roi.row_end(i); });
        const Meeting q(BIN_COLS, left, left + TILE_COLS, [&](int i) { return roi.col_start(i); },
                        [&](int i) { return roi.col_end(i); });
        if (p.end > 0 && q.end > 0) rows = p.first << 16 | p.end, cols = q.first << 16 | q.end;
      }
    }
    for (unsigned meeting = __ballot_sync(~0u, rows != 0); meeting; meeting &= meeting - 1) {
      const int from = __ffs(meeting) - 1;
      const int its_rows = __shfl_sync(~0u, rows, from), its_cols = __shfl_sync(~0u, cols, from);
      const int first_row = its_rows >> 16, first_col = its_cols >> 16;
      const int num_cols = (its_cols & 0xffff) - first_col;
      const int bins = ((its_rows & 0xffff) - first_row) * num_cols;
      for (int done = 0; done < bins;) {
        const int now = min(bins - done, kListed - listed);
        for (int i = done + lane; i < done + now; i += kWarp) {
          const int p = first_row + i / num_cols, q = first_col + i % num_cols;
          list[listed + i - done] = ((base + from) * BIN_ROWS + p) * BIN_COLS + q;
        }
        listed += now, done += now;
        if (listed == kListed) add_listed();
      }
    }
  }
  add_listed();

  if (!has_vector) return;
  for (int i = 0; i < TILE_ROWS * TILE_COLS; ++i) {
    const int row = top + i / TILE_COLS, col = left + i % TILE_COLS;
    if (row >= HEIGHT || col >= WIDTH) continue;
    Elements x;
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
      x.of[j] = Element::store(sums[(i * VECTOR + j) * kWarp + lane]);
    }
    gradient[(Long(map) * kCells + row * WIDTH + col) * kVectors + vector] = x;
  }
}
