// The order of elements, the maximum so far, and windows of cells whose maxima are made first.
//
//   WITH_ARGMAX   0 or 1
//   WINDOW        rows and columns of a window, 0 for none
#pragma once

#include "elements.cuh"

// Of a multiprocessor, at least. Left to itself the assembler puts registers into memory for more.
constexpr int kBlocksAtOnce = 2;

// NaN is larger than any number, zeros are equal, and nothing is larger than an equal. Of && and ||
// the compiler would make branches, which took a third longer.
__device__ inline bool is_larger(Value value, Value maximum) {
  return !((value <= maximum) | Element::is_nan(maximum));
}
__device__ inline bool is_as_large(Value value, Value maximum) {
  return !((value < maximum) | (Element::is_nan(maximum) & !Element::is_nan(value)));
}

struct Maxima {
  Value value[VECTOR];
  int cell[VECTOR];

  // Before any cell has been seen, of which `first` will be the first: no value is smaller.
  __device__ void start(int first) {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) value[i] = Element::least(), cell[i] = first;
  }
  // For cells, or maxima of several, in row-major order.
  __device__ void see_next(int i, Value v, int at) {
    const bool larger = is_larger(v, value[i]);
    value[i] = larger ? v : value[i];
    cell[i] = larger ? at : cell[i];
  }
  __device__ void see_next(const Elements& x, int at) {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) see_next(i, Element::load(x.of[i]), at);
  }
  // For cells, or maxima of several, in any order.
  __device__ void see(int i, Value v, int at) {
    const bool better = is_larger(v, value[i]) |
                        (WITH_ARGMAX & is_as_large(v, value[i]) & (at < cell[i]));
    value[i] = better ? v : value[i];
    cell[i] = better ? at : cell[i];
  }
  __device__ Elements values() const {
    Elements x;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) x.of[i] = Element::store(value[i]);
    return x;
  }
  __device__ Indices cells() const {
    Indices at;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) at.of[i] = cell[i];
    return at;
  }
};

#if WINDOW
// A window begins at every cell that has room for it.
constexpr int kWindowRows = HEIGHT - WINDOW + 1, kWindowCols = WIDTH - WINDOW + 1;
constexpr Long kWindows = Long(kWindowRows) * kWindowCols;  // of a map
// Where in a window its maximum is, row * WINDOW + column.
typedef Vector<unsigned char> Places;
#endif
