// The order of elements, the maximum so far, and tiles: the maxima of 2^level x 2^level cells.
//
//   WITH_ARGMAX   0 or 1
//   LEVELS        levels of tiles, 0 for none
#pragma once

#include "elements.cuh"

// Of a multiprocessor, at least. Left to itself the assembler puts registers into memory for more.
constexpr int kBlocksAtOnce = 2;

// NaN is larger than any number, zeros are equal, and nothing is larger than an equal.
__device__ inline bool is_larger(Value value, Value maximum) {
  return !(value <= maximum) && !Element::is_nan(maximum);
}
__device__ inline bool is_equal(Value value, Value maximum) {
  return value == maximum || (Element::is_nan(value) && Element::is_nan(maximum));
}

struct Maxima {
  Value value[VECTOR];
  int cell[VECTOR];

  // Before any cell has been seen, of which `first` will be the first: no value is smaller.
  __device__ void start(int first) {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) value[i] = Element::least(), cell[i] = first;
  }
  // For cells in row-major order.
  __device__ void see_next(const Elements& x, int at) {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      const Value v = Element::load(x.of[i]);
      const bool larger = is_larger(v, value[i]);
      value[i] = larger ? v : value[i];
      cell[i] = larger ? at : cell[i];
    }
  }
  // For cells, or maxima of several, in any order.
  __device__ void see(int i, Value v, int at) {
    const bool better = is_larger(v, value[i]) ||
                        (WITH_ARGMAX && is_equal(v, value[i]) && at < cell[i]);
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

// Tiles lie level after level from level 1 on, and in a level image after image.
__device__ inline Long tiles_of(int level) {  // of all images
  return Long(GROUPS) * IMAGES * (HEIGHT >> level) * (WIDTH >> level);
}
__device__ inline Long first_tile(int level, Long image) {
  Long tile = image * ((HEIGHT >> level) * (WIDTH >> level));
  for (int below = 1; below < level; ++below) tile += tiles_of(below);
  return tile;
}
