#include "strips.h"

#include <algorithm>
#include <cstring>

#include "memory.h"

namespace jax_roipool {
namespace {

// Of one worker, for whom `MaximumLoops::across` can read a line more: no other writes to it.
int64_t with_a_line_more(int64_t bytes) {
  return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine + kCacheLine;
}

}  // namespace

Strips::Strips(const MaximumLoops& loops, const MapShape& map, bool with_argmax, int64_t workers)
    : loops_(loops),
      map_(map),
      value_bytes_(map.channels * loops.item_size),
      row_bytes_(with_argmax ? map.channels * loops.argmax_size : 0),
      values_(new char[workers * with_a_line_more(map.width * value_bytes_)]),
      rows_(new char[workers * with_a_line_more(map.width * row_bytes_)]) {}

void Strips::pool(int64_t worker, const void* image, Range rows, const BinCols& cols, void* pooled,
                  void* argmax) {
  fill(worker, image, rows, cols.hull);
  loops_.across(value(worker, 0), argmax == nullptr ? nullptr : row(worker, 0), cols.of_bin.data(),
                cols.of_bin.size(), map_.width, map_.channels, pooled, argmax);
}

// Takes the maximum of each of these columns.
void Strips::fill(int64_t worker, const void* image, Range rows, Range cols) {
  constexpr int64_t kCells = 64;
  const void* cells[kCells];
  int32_t indices[kCells];
  const int64_t channels = cols.size() * map_.channels;
  void* const maxima = value(worker, cols.start);
  for (int64_t begin = rows.start; begin < rows.end; begin += kCells) {
    const int64_t count = std::min(kCells, rows.end - begin);
    for (int64_t i = 0; i < count; ++i) {
      cells[i] = at(image, ((begin + i) * map_.width + cols.start) * value_bytes_);
      indices[i] = static_cast<int32_t>(begin + i);
    }
    const bool resume = begin > rows.start;
    if (row_bytes_ == 0) {
      loops_.max(cells, count, channels, resume, maxima);
    } else {
      loops_.argmax(cells, indices, count, channels, resume, maxima, row(worker, cols.start));
    }
  }
  // The last column's vectors go on after it, in lanes that are thrown away.
  std::memset(value(worker, cols.end), 0, kCacheLine);
  if (row_bytes_ > 0) std::memset(row(worker, cols.end), 0, kCacheLine);
}

void* Strips::value(int64_t worker, int64_t col) {
  return values_.get() + worker * with_a_line_more(map_.width * value_bytes_) + col * value_bytes_;
}

void* Strips::row(int64_t worker, int64_t col) {
  return rows_.get() + worker * with_a_line_more(map_.width * row_bytes_) + col * row_bytes_;
}

}  // namespace jax_roipool
