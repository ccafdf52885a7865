#include "strips.h"

#include <algorithm>

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
      values_(workers * with_a_line_more(map.width * value_bytes_)),
      rows_(workers * with_a_line_more(map.width * row_bytes_)) {}

bool Strips::serve(const MaximumLoops& loops, int64_t channels, bool with_argmax) {
  const int64_t lane = with_argmax ? std::max<int64_t>(loops.item_size, 4) : loops.item_size;
  return channels * lane <= 32;
}

void Strips::pool(int64_t worker, const void* image, Range rows, const std::vector<Range>& cols,
                  void* pooled, void* argmax) {
  Range hull = {map_.width, 0};
  for (const Range& range : cols) {
    if (range.size() == 0) continue;
    hull = {std::min(hull.start, range.start), std::max(hull.end, range.end)};
  }
  if (hull.size() == 0) return;
  fill(worker, image, rows, hull);
  loops_.across(value(worker, 0), argmax == nullptr ? nullptr : row(worker, 0), cols.data(),
                cols.size(), map_.width, map_.channels, pooled, argmax);
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
}

void* Strips::value(int64_t worker, int64_t col) {
  return values_.data() + worker * with_a_line_more(map_.width * value_bytes_) + col * value_bytes_;
}

void* Strips::row(int64_t worker, int64_t col) {
  return rows_.data() + worker * with_a_line_more(map_.width * row_bytes_) + col * row_bytes_;
}

}  // namespace jax_roipool
