// Tiles of every level: the maxima of 2^level x 2^level cells of a map, and their cells.
#include "maxima.cuh"

// A thread makes one tile of the last level, and those that it is made of, in Z-order: a tile is
// whole when the last of its four parts is.
extern "C" __global__ void __launch_bounds__(THREADS, kBlocksAtOnce)
KERNEL(const Elements* __restrict__ features, const int* __restrict__ are_used,
       Elements* __restrict__ tile_maxima
#if WITH_ARGMAX
       , Indices* __restrict__ tile_cells
#endif
) {
  if (!*are_used) return;
  constexpr int kRows = ((HEIGHT - 1) >> LEVELS) + 1, kCols = ((WIDTH - 1) >> LEVELS) + 1;
  const Long item = Long(blockIdx.x) * THREADS + threadIdx.x;
  if (item >= Long(GROUPS) * IMAGES * kRows * kCols * kVectors) return;
  const int vector = item % kVectors;
  const Long tile = item / kVectors, image = tile / (kRows * kCols);
  const int tile_row = tile % (kRows * kCols) / kCols, tile_col = tile % kCols;
  const Elements* map = features + image * kCells * kVectors + vector;

  Maxima maxima[LEVELS];
  for (int part = 0; part < 1 << 2 * (LEVELS - 1); ++part) {
    int row = tile_row << (LEVELS - 1), col = tile_col << (LEVELS - 1);
#pragma unroll
    for (int bit = 0; bit < LEVELS - 1; ++bit) {
      col |= (part >> 2 * bit & 1) << bit;
      row |= (part >> (2 * bit + 1) & 1) << bit;
    }
    if (row >= HEIGHT >> 1 || col >= WIDTH >> 1) continue;

    const int corner = 2 * row * WIDTH + 2 * col;
    Elements x[4];  // copies, loaded at once: elements of a reference would come one by one
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = map[OFFSET(corner + i / 2 * WIDTH + i % 2) * kVectors];
    maxima[0].start(corner);
#pragma unroll
    for (int i = 0; i < 4; ++i) maxima[0].see_next(x[i], corner + i / 2 * WIDTH + i % 2);

    bool is_whole = true;
#pragma unroll
    for (int level = 1; level <= LEVELS; ++level) {
      const int height = HEIGHT >> level, width = WIDTH >> level;
      if (is_whole && row < height && col < width) {
        const Maxima& made = maxima[level - 1];
        const Long at = (first_tile(level, image) + row * width + col) * kVectors + vector;
        tile_maxima[at] = made.values();
#if WITH_ARGMAX
        tile_cells[at] = made.cells();
#endif
        if (level < LEVELS) {
          Maxima& next = maxima[level];
          const bool is_first = (part >> 2 * (level - 1) & 3) == 0;
#pragma unroll
          for (int i = 0; i < VECTOR; ++i) {
            if (is_first) {
              next.value[i] = made.value[i], next.cell[i] = made.cell[i];
            } else {
              next.see(i, made.value[i], made.cell[i]);
            }
          }
        }
      }
      is_whole = is_whole && (part >> 2 * (level - 1) & 3) == 3;
      row >>= 1, col >>= 1;
    }
  }
}
