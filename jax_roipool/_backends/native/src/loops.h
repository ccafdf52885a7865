// The innermost loops: over the channels of a few cells. Everything that depends on the type of an
// element is here, and nothing else is compiled once per set of vector instructions.
#pragma once

#include <array>
#include <cstdint>

#include "shapes.h"

namespace jax_roipool {

enum class Element {
  kFloat32,
  kFloat64,
  kBfloat16,
  kFloat16,
  kInt8,
  kInt16,
  kInt32,
  kInt64,
  kUint8,
  kUint16,
  kUint32,
  kUint64,
};
constexpr int kElements = 12;

// Argmaxes are int16 where an int16 can hold every index of a map: argmaxes are read and written as
// often as maxima.
enum class Argmax { kInt16, kInt32 };
constexpr int kArgmaxes = 2;

// A cell is a pointer to the [channels] of one place of a feature map, and what is pooled of a bin,
// its argmax, tangent and cotangent are [channels] too; `c` is a channel. NaN is larger than any
// number and zeros are equal. The floating-point environment must be the default one: XLA's treats
// subnormals as zeros.
struct MaximumLoops {
  int64_t item_size;    // of an element
  int64_t argmax_size;  // of an argmax
  int64_t sum_size;     // of a sum of gradients, in float32 at least; 0 for integers

  // pooled[c] = the largest of the cells' [c], and of pooled[c] too if `resume`.
  void (*max)(const void* const* cells, int64_t count, int64_t channels, bool resume, void* pooled);

  // Does the same as `max`, and argmax[c] = the index of the first cell with the largest [c]. With
  // `resume`, the cells that `pooled` and `argmax` are of come before all these cells.
  void (*argmax)(const void* const* cells, const int32_t* indices, int64_t count, int64_t channels,
                 bool resume, void* pooled, void* argmax);

  // Does the same as `argmax` for cells in any order, each with [channels] of argmaxes.
  void (*merge)(const void* const* cells, const void* const* argmaxes, int64_t count,
                int64_t channels, bool resume, void* pooled, void* argmax);

  // Of each bin of a row, the largest of its columns: pooled[bin][c] = the largest values[col][c]
  // of the columns `cols[bin]`, and argmax[bin][c] = the first cell that has it, of a map that has
  // `width` columns. rows[col][c] is the row of the value; without rows there are no argmaxes. Bins
  // without columns are left as they are. After the last value, and the last row, 64 bytes more can
  // be read.
  void (*across)(const void* values, const void* rows, const Range* cols, int64_t bins,
                 int64_t width, int64_t channels, void* pooled, void* argmax);

  // pooled[c] = -infinity, or the smallest integer.
  void (*fill_lowest)(int64_t channels, void* pooled);

  // tangent[c] = map[argmax[c]][c], or 0 if argmax[c] is not in [0, cells). `map` is
  // [cells, channels].
  void (*gather)(const void* map, const void* argmax, int64_t cells, int64_t channels,
                 void* tangent);

  // sums[argmax[c]][c] += cotangent[c], if argmax[c] is in [0, cells). From one cell of `sums` to
  // the next there are `stride` channels.
  void (*scatter)(const void* cotangent, const void* argmax, int64_t cells, int64_t channels,
                  int64_t stride, void* sums);
};

// A cell of a row or of a column of bins, and what it weighs.
struct Tap {
  int64_t offset;  // of the row or the column, in elements of the map
  float weight;
};

struct Taps {
  const Tap* taps;
  int64_t count;

  const Tap* begin() const { return taps; }
  const Tap* end() const { return taps + count; }
};

// The cells of a bin are those of every row and every column, at the sum of their offsets, and
// weigh the product of their weights: in that order, row by row. Arithmetic is that of sums, and no
// multiplication is fused with an addition, so that every set of instructions gives the same bits.
struct SumLoops {
  int64_t item_size;  // of an element
  int64_t sum_size;   // of a sum, in float32 at least

  // pooled[c] = the sum over the cells of weight * cell[c], rounded once.
  void (*sum)(const void* map, Taps rows, Taps columns, int64_t channels, void* pooled);

  // cell[c] += weight * cotangent[c] for each cell of `sums`, in order.
  void (*scatter)(const void* cotangent, Taps rows, Taps columns, int64_t channels, void* sums);
};

// In the order of Element and of Argmax.
using MaximumTables = std::array<std::array<MaximumLoops, kArgmaxes>, kElements>;

// In the order of Element, of which the floats come first.
constexpr int kFloats = 4;
using SumTables = std::array<SumLoops, kFloats>;

// The sets of vector instructions, as far as *_loops.cc are compiled for them.
namespace baseline {
extern const MaximumTables kMaximumTables;
extern const SumTables kSumTables;
}  // namespace baseline
namespace avx2 {
extern const MaximumTables kMaximumTables;
extern const SumTables kSumTables;
}  // namespace avx2
namespace avx512 {
extern const MaximumTables kMaximumTables;
extern const SumTables kSumTables;
}  // namespace avx512

}  // namespace jax_roipool
