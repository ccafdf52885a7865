#include "elements.h"
#include "loops.h"

namespace jax_roipool::VECTORS {
namespace {

template <class E, class W>
auto load_to_sum(const typename E::Stored* from) {
  typename W::template Of<typename E::Stored> stored;
  std::memcpy(&stored, from, sizeof stored);
  return E::template to_sum<W>(stored);
}

template <class V, class T>
V load_vector(const T* from) {
  V vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class V, class T>
void store_vector(const V& vector, T* to) {
  std::memcpy(to, &vector, sizeof vector);
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
      for (const Tap& row : rows) {
        for (const Tap& column : columns) {
          const Sum weight = Sum(row.weight) * Sum(column.weight);
          const T* const cell = cells + row.offset + column.offset;
          for (int i = 0; i < vectors; ++i) {
            sums[i] += weight * load_to_sum<E, W>(cell + i * W::kLanes);
          }
        }
      }
      T* const to = static_cast<T*>(pooled) + channel;
      for (int i = 0; i < vectors; ++i) {
        const typename W::template Of<T> rounded = E::template from_sum<W>(sums[i]);
        store_vector(rounded, to + i * W::kLanes);
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
      for (const Tap& row : rows) {
        for (const Tap& column : columns) {
          const Sum weight = Sum(row.weight) * Sum(column.weight);
          Sum* const cell = cells + row.offset + column.offset;
          for (int i = 0; i < vectors; ++i) {
            Sum* const to = cell + i * W::kLanes;
            const Sums total = load_vector<Sums>(to) + weight * values[i];
            store_vector(total, to);
          }
        }
      }
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
