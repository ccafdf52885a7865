#include "pooling.h"

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace jax_roipool {
namespace {

char* at(void* array, int64_t bytes) { return static_cast<char*>(array) + bytes; }
const char* at(const void* array, int64_t bytes) {
  return static_cast<const char*>(array) + bytes;
}

// Fresh memory comes in pages of 4 KiB, and their faults take several times as long as writing to
// them does. NumPy asks for huge pages in the same way, from the same size on.
void prefer_huge_pages(void* array, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kEnough = 4 << 20, kPage = 4096;
  if (bytes < kEnough) return;
  const int64_t inside = -reinterpret_cast<intptr_t>(array) & (kPage - 1);
  madvise(at(array, inside), bytes - inside, MADV_HUGEPAGE);
#else
  (void)array, (void)bytes;
#endif
}

bool is_in(int64_t index, int64_t size) { return 0 <= index && index < size; }

// The maximum of one rectangle of an image, with the index of its cell if `argmax` is not null.
void pool_bin(const ChannelLoops& loops, const MapShape& map, const void* image, int64_t row_start,
              int64_t row_end, int64_t col_start, int64_t col_end, void* pooled, void* argmax) {
  constexpr int64_t kCells = 64;
  const void* cells[kCells];
  int32_t indices[kCells];
  const int64_t cell_bytes = map.channels * loops.item_size;
  bool resume = false;
  int64_t count = 0;
  const auto flush = [&] {
    if (argmax != nullptr) {
      loops.argmax(cells, indices, count, map.channels, resume, pooled, argmax);
    } else {
      loops.max(cells, count, map.channels, resume, pooled);
    }
    resume = true;
    count = 0;
  };
  for (int64_t row = row_start; row < row_end; ++row) {
    for (int64_t col = col_start; col < col_end; ++col) {
      const int64_t cell = row * map.width + col;
      cells[count] = at(image, cell * cell_bytes);
      indices[count] = static_cast<int32_t>(cell);
      if (++count == kCells) flush();
    }
  }
  if (count > 0) flush();
}

}  // namespace

void rectangle_max(const ChannelLoops& loops, const MapShape& map, const PooledShape& shape,
                   const void* features, const Rectangles& rectangles, bool empty_is_lowest,
                   void* pooled, void* argmax, const Threads& threads) {
  const int64_t channels = shape.channels, bin_bytes = channels * loops.item_size;
  const int64_t argmax_bytes = channels * loops.argmax_size;
  const int64_t bin_rows = shape.groups * shape.rois * shape.bin_rows;
  prefer_huge_pages(pooled, bin_rows * shape.bin_cols * bin_bytes);
  if (argmax != nullptr) {
    prefer_huge_pages(argmax, bin_rows * shape.bin_cols * argmax_bytes);
  }
  const auto edge = [](int32_t cell, int64_t size) {
    return std::clamp<int64_t>(cell, 0, size);
  };

  parallel_for(threads, bin_rows, [&](int64_t bin_row) {
    const int64_t roi = bin_row / shape.bin_rows, group = roi / shape.rois;
    const int64_t image_index = rectangles.image_index[roi];
    const bool has_image = is_in(image_index, map.images);
    const void* const image =
        has_image ? at(features,
                       (group * map.images + image_index) * map.image_size() * loops.item_size)
                  : nullptr;
    const int64_t row_start = edge(rectangles.row_start[bin_row], map.height);
    const int64_t row_end = edge(rectangles.row_end[bin_row], map.height);
    for (int64_t q = 0; q < shape.bin_cols; ++q) {
      const int64_t bin = bin_row * shape.bin_cols + q;
      void* const bin_pooled = at(pooled, bin * bin_bytes);
      void* const bin_argmax = argmax == nullptr ? nullptr : at(argmax, bin * argmax_bytes);
      const int64_t col_start = edge(rectangles.col_start[roi * shape.bin_cols + q], map.width);
      const int64_t col_end = edge(rectangles.col_end[roi * shape.bin_cols + q], map.width);
      if (has_image && row_start < row_end && col_start < col_end) {
        pool_bin(loops, map, image, row_start, row_end, col_start, col_end, bin_pooled,
                 bin_argmax);
        continue;
      }
      if (has_image && empty_is_lowest) {
        loops.fill_lowest(channels, bin_pooled);
      } else {
        std::memset(bin_pooled, 0, bin_bytes);
      }
      if (bin_argmax != nullptr) std::memset(bin_argmax, 0xFF, argmax_bytes);  // -1
    }
  });
}

void gather_at_argmax(const ChannelLoops& loops, const MapShape& map, const PooledShape& shape,
                      const void* features, const void* argmax, const int32_t* image_index,
                      void* tangent, const Threads& threads) {
  const int64_t channels = shape.channels, bin_bytes = channels * loops.item_size;
  prefer_huge_pages(tangent, shape.groups * shape.rois * shape.bins() * bin_bytes);
  parallel_for(threads, shape.groups * shape.rois, [&](int64_t roi) {
    const int64_t group = roi / shape.rois;
    const bool has_image = is_in(image_index[roi], map.images);
    const int64_t image = group * map.images + (has_image ? image_index[roi] : 0);
    for (int64_t bin = roi * shape.bins(); bin < (roi + 1) * shape.bins(); ++bin) {
      loops.gather(at(features, image * map.image_size() * loops.item_size),
                   at(argmax, bin * channels * loops.argmax_size), has_image ? map.cells() : 0, channels,
                   at(tangent, bin * bin_bytes));
    }
  });
}

void scatter_at_argmax(const ChannelLoops& loops, const MapShape& map, const PooledShape& shape,
                       const void* cotangent, const void* argmax, const int32_t* image_index,
                       void* gradient, const Threads& threads) {
  const int64_t channels = map.channels, images = map.groups * map.images;
  if (images * map.image_size() == 0) return;
  prefer_huge_pages(gradient, images * map.image_size() * loops.item_size);

  // Threads share out the images, and then the channels: no two of them write to one cell. As few
  // parts as keep them busy, since what is read from end to end is read fastest.
  constexpr int64_t kCacheLine = 64;
  const int64_t parts = std::max<int64_t>(1, (threads.count + images - 1) / images);
  const int64_t part = (channels + parts - 1) / parts;
  const int64_t unit = std::max<int64_t>(1, kCacheLine / loops.item_size);
  const int64_t block = (part + unit - 1) / unit * unit;
  const int64_t blocks = (channels + block - 1) / block;
  const bool sums_apart = loops.sum_size != loops.item_size;

  parallel_for(threads, images * blocks, [&](int64_t task) {
    const int64_t image = task / blocks, group = image / map.images;
    const int64_t channel = task % blocks * block, count = std::min(block, channels - channel);
    void* const out = at(gradient, (image * map.image_size() + channel) * loops.item_size);
    std::vector<char> apart;
    void* sums = out;
    int64_t stride = channels;
    if (sums_apart) {
      apart.resize(map.cells() * count * loops.sum_size);
      sums = apart.data();
      stride = count;
    } else {
      for (int64_t cell = 0; cell < map.cells(); ++cell) {
        std::memset(at(out, cell * channels * loops.item_size), 0, count * loops.item_size);
      }
    }
    for (int64_t roi = group * shape.rois; roi < (group + 1) * shape.rois; ++roi) {
      if (group * map.images + image_index[roi] != image) continue;
      for (int64_t bin = roi * shape.bins(); bin < (roi + 1) * shape.bins(); ++bin) {
        const int64_t first = bin * channels + channel;
        loops.scatter(at(cotangent, first * loops.item_size),
                      at(argmax, first * loops.argmax_size), map.cells(), count, stride, sums);
      }
    }
    if (sums_apart) {
      for (int64_t cell = 0; cell < map.cells(); ++cell) {
        loops.round(at(sums, cell * stride * loops.sum_size), count,
                    at(out, cell * channels * loops.item_size));
      }
    }
  });
}

}  // namespace jax_roipool
