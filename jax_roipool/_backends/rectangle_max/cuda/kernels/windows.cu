// The maxima of all windows of WINDOW x WINDOW cells, and where in them they are.
//
//   BAND   windows that a thread makes, one below the other
#include "maxima.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, kBlocksAtOnce)
KERNEL(const Elements* __restrict__ features, const int* __restrict__ are_used,
       Elements* __restrict__ window_maxima
#if WITH_ARGMAX
       , Places* __restrict__ window_places
#endif
) {
  if (!*are_used) return;
  constexpr int kBands = (kWindowRows - 1) / BAND + 1;
  const Long item = Long(blockIdx.x) * THREADS + threadIdx.x;
  if (item >= Long(GROUPS) * IMAGES * kBands * kWindowCols * kVectors) return;
  const int vector = item % kVectors, col = item / kVectors % kWindowCols;
  const Long band = item / kVectors / kWindowCols, image = band / kBands;
  const int first_row = band % kBands * BAND;
  const Elements* map = features + image * kCells * kVectors + vector;

  // Of WINDOW cells of each of the last WINDOW rows, and in which column they are. All are set, as
  // compilers may take what was never set for anything.
  Maxima rows[WINDOW];
#pragma unroll
  for (int i = 0; i < WINDOW; ++i) rows[i].start(0);
#pragma unroll 1
  for (int row = first_row; row < min(first_row + BAND + WINDOW - 1, HEIGHT); ++row) {
#pragma unroll
    for (int i = 1; i < WINDOW; ++i) rows[i - 1] = rows[i];
    Elements x[WINDOW];  // copies, loaded at once: elements of a reference would come one by one
#pragma unroll
    for (int i = 0; i < WINDOW; ++i) x[i] = map[OFFSET(row * WIDTH + col + i) * kVectors];
    rows[WINDOW - 1].start(0);
#pragma unroll
    for (int i = 0; i < WINDOW; ++i) rows[WINDOW - 1].see_next(x[i], i);

    const int top = row - WINDOW + 1;
    if (top < first_row) continue;
    Maxima window = rows[0];
#pragma unroll
    for (int i = 1; i < WINDOW; ++i) {
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) {
        window.see_next(j, rows[i].value[j], i * WINDOW + rows[i].cell[j]);
      }
    }
    const Long at = (image * kWindows + Long(top) * kWindowCols + col) * kVectors + vector;
    window_maxima[at] = window.values();
#if WITH_ARGMAX
    Places places;
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) places.of[j] = window.cell[j];
    window_places[at] = places;
#endif
  }
}
