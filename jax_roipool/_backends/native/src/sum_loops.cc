#include "elements.h"
#include "loops.h"

namespace jax_roipool::VECTORS {
namespace {

template <class E, class W>
auto load_to_sum(const typename E::Stored* from) {
  return E::template to_sum<W>(load_vector<W>(from));
}

// Calls `add` with the weight and the offset of each cell, in order.
template <class Sum, class Add>
void for_each_cell(Taps rows, Taps columns, Add add) {
  for (const Tap& row : rows) {
    for (const Tap& column : columns) {
      add(Sum(row.weight) * Sum(column.weight), row.offset + column.offset);
    }
  }
}

template <class E>
struct Loops {
  using T = typename E::Stored;
  using Sum = typename E::Sum;
  using Wide = VectorsOf<Sum>;

  // Calls `loop` for all channels, with a width, a constant number of vectors, and the first
  // channel: for so many vectors at a time that none waits for the one before, for one, and for the
  // channels that are left.
  template <class Loop>
  static void in_vectors(int64_t channels, Loop loop) {
    int64_t c = 0;
    constexpr int kMany = 8;
    for (; c + kMany * Wide::kLanes <= channels; c += kMany * Wide::kLanes) {
      loop(Wide(), Constant<kMany>(), c);
    }
    for (; c + Wide::kLanes <= channels; c += Wide::kLanes) {
      loop(Wide(), Constant<1>(), c);
    }
    for (; c < channels; ++c) loop(One(), Constant<1>(), c);
  }

  static void sum(const void* map, Taps rows, Taps columns, int64_t channels, void* pooled) {
    in_vectors(channels, [&](auto width, auto vectors, int64_t channel) {
      using W = decltype(width);
      using Sums = typename W::template Of<Sum>;
      const T* const cells = static_cast<const T*>(map) + channel;
      Sums sums[vectors] = {};
      for_each_cell<Sum>(rows, columns, [&](Sum weight, int64_t offset) {
        for (int i = 0; i < vectors; ++i) {
          sums[i] += weight * load_to_sum<E, W>(cells + offset + i * W::kLanes);
        }
      });
      T* const to = static_cast<T*>(pooled) + channel;
      for (int i = 0; i < vectors; ++i) {
        store_vector<W>(E::template from_sum<W>(sums[i]), to + i * W::kLanes);
      }
    });
  }

  static void scatter(const void* cotangent, Taps rows, Taps columns, int64_t channels,
                      void* sums) {
    in_vectors(channels, [&](auto width, auto vectors, int64_t channel) {
      using W = decltype(width);
      using Sums = typename W::template Of<Sum>;
      Sum* const cells = static_cast<Sum*>(sums) + channel;
      Sums values[vectors];
      for (int i = 0; i < vectors; ++i) {
        values[i] = load_to_sum<E, W>(static_cast<const T*>(cotangent) + channel + i * W::kLanes);
      }
      for_each_cell<Sum>(rows, columns, [&](Sum weight, int64_t offset) {
        for (int i = 0; i < vectors; ++i) {
          Sum* const to = cells + offset + i * W::kLanes;
          store_vector<W>(load_vector<W>(to) + weight * values[i], to);
        }
      });
    });
  }

  static constexpr SumLoops table() { return {sizeof(T), sizeof(Sum), sum, scatter}; }
};

}  // namespace

const SumTables kSumTables = {
    Loops<Float<float>>::table(),
    Loops<Float<double>>::table(),
    Loops<Bfloat16>::table(),
    Loops<Float16>::table(),
};

}  // namespace jax_roipool::VECTORS
