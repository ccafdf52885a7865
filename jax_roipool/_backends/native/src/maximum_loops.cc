#include "elements.h"
#include "loops.h"

namespace jax_roipool::VECTORS {
namespace {

// pooled[c] = the maximum of first[c] and of the [c] of `count` cells, from `channel` on, for as
// many channels as fill vectors. Returns the first channel that is left. `Count` is an integer, or
// a constant for which the loop unrolls.
template <class E, class W, class Count>
int64_t max_of(const typename E::Stored* first, const typename E::Stored* const* cells, Count count,
               int64_t channel, int64_t channels, typename E::Stored* pooled) {
  using Lanes = typename W::template Of<typename E::Lane>;
  for (; channel + W::kLanes <= channels; channel += W::kLanes) {
    Lanes maximum = load<E, W>(first + channel), previous = maximum;
    [[maybe_unused]] auto numbers = maximum == maximum;
    for (int i = 0; i < count; ++i) {
      const Lanes value = load<E, W>(cells[i] + channel);
      maximum = value > maximum ? value : maximum;
      if constexpr (E::kHasNan) {  // two at a time
        if (i % 2 == 1 || i + 1 == count) numbers &= E::are_numbers(previous, value);
        previous = value;
      }
    }
    if constexpr (E::kHasNan) {
      constexpr auto kNan = std::numeric_limits<typename E::Lane>::quiet_NaN();
      maximum = numbers ? maximum : Lanes{} + kNan;
    }
    store<E, W>(maximum, pooled + channel);
  }
  return channel;
}

// Integers that a comparison of lanes can choose between.
template <class E>
using Index = std::conditional_t<sizeof(typename E::Lane) == 8, int64_t, int32_t>;

template <class E, class A, class W>
auto load_indices(const A* from) {
  typename W::template Of<A> stored;
  std::memcpy(&stored, from, sizeof stored);
  return W::template convert<Index<E>>(stored);
}

template <class A, class W, class V>
void store_indices(V indices, A* to) {
  const auto stored = W::template convert<A>(indices);
  std::memcpy(to, &stored, sizeof stored);
}

// The same as `max_of`, and argmax[c] = the index of the maximum's cell. With `resume`, `first` is
// what is pooled so far, and has its indices in `argmax`.
template <class E, class A, class W, class Count>
int64_t argmax_of(const typename E::Stored* first, Index<E> first_index, bool resume,
                  const typename E::Stored* const* cells, const int32_t* indices, Count count,
                  int64_t channel, int64_t channels, typename E::Stored* pooled, A* argmax) {
  using Indices = typename W::template Of<Index<E>>;
  for (; channel + W::kLanes <= channels; channel += W::kLanes) {
    auto maximum = load<E, W>(first + channel);
    auto best = resume ? load_indices<E, A, W>(argmax + channel) : Indices{} + first_index;
    for (int i = 0; i < count; ++i) {
      const auto value = load<E, W>(cells[i] + channel);
      const auto larger = E::is_larger(value, maximum);
      maximum = larger ? value : maximum;
      best = larger ? Indices{} + indices[i] : best;
    }
    store<E, W>(maximum, pooled + channel);
    store_indices<A, W>(best, argmax + channel);
  }
  return channel;
}

// The same as `argmax_of` for cells that have an index for each channel, and come in any order.
template <class E, class A, class W, class Count>
int64_t merge_of(const typename E::Stored* first, const A* first_argmax,
                 const typename E::Stored* const* cells, const A* const* argmaxes, Count count,
                 int64_t channel, int64_t channels, typename E::Stored* pooled, A* argmax) {
  for (; channel + W::kLanes <= channels; channel += W::kLanes) {
    auto maximum = load<E, W>(first + channel);
    auto best = load_indices<E, A, W>(first_argmax + channel);
    for (int i = 0; i < count; ++i) {
      const auto value = load<E, W>(cells[i] + channel);
      const auto index = load_indices<E, A, W>(argmaxes[i] + channel);
      const auto better =
          E::is_larger(value, maximum) | (E::is_same(value, maximum) & (index < best));
      maximum = better ? value : maximum;
      best = better ? index : best;
    }
    store<E, W>(maximum, pooled + channel);
    store_indices<A, W>(best, argmax + channel);
  }
  return channel;
}

// Calls `loop` with a constant equal to `count`, which is at most kLimit.
template <int kLimit, class Loop>
int64_t with_constant(int64_t count, Loop loop) {
  if constexpr (kLimit > 0) {
    if (count < kLimit) return with_constant<kLimit - 1>(count, loop);
  }
  return loop(Constant<kLimit>());
}

// So many cells are read side by side; more of them would not leave the other registers enough.
constexpr int kMaxCells = 8;
constexpr int kArgmaxCells = 4;

template <class E, class A>
struct Loops {
  using T = typename E::Stored;
  using Sum = typename E::Sum;
  using Wide = Many<sizeof(typename E::Lane)>;

  // Calls `loop` for the cells in turns: for vectors of channels, and then for the channels that
  // are left. A turn begins with what is pooled so far, or with the first cell, and goes on with at
  // most kCells cells more.
  //
  // `loop` is given a width, what the turn begins with, whether that is what is pooled so far, the
  // number of cells before the others, the number of these others, and the first channel. `loop`
  // returns the first channel that is left.
  template <int kCells, class Loop>
  static void in_turns(const T* const* cells, int64_t count, bool resume, const T* pooled,
                       Loop loop) {
    for (int64_t begin = 0; begin < count; resume = true) {
      const T* const first = resume ? pooled : cells[begin++];
      const int64_t more = count - begin < kCells ? count - begin : kCells;
      const int64_t channel = with_constant<kCells>(more, [&](auto constant) {
        return loop(Wide(), first, resume, begin, constant, int64_t{0});
      });
      loop(One(), first, resume, begin, more, channel);
      begin += more;
    }
  }

  static void max(const void* const* cells, int64_t count, int64_t channels, bool resume,
                  void* pooled) {
    const T* const* const values = reinterpret_cast<const T* const*>(cells);
    T* const maxima = static_cast<T*>(pooled);
    in_turns<kMaxCells>(
        values, count, resume, maxima,
        [&](auto width, const T* first, bool, int64_t begin, auto more, int64_t channel) {
          return max_of<E, decltype(width)>(first, values + begin, more, channel, channels, maxima);
        });
  }

  static void argmax(const void* const* cells, const int32_t* indices, int64_t count,
                     int64_t channels, bool resume, void* pooled, void* argmax) {
    const T* const* const values = reinterpret_cast<const T* const*>(cells);
    T* const maxima = static_cast<T*>(pooled);
    A* const best = static_cast<A*>(argmax);
    in_turns<kArgmaxCells>(
        values, count, resume, maxima,
        [&](auto width, const T* first, bool resume, int64_t begin, auto more, int64_t channel) {
          const int32_t first_index = resume ? 0 : indices[0];
          return argmax_of<E, A, decltype(width)>(first, first_index, resume, values + begin,
                                                  indices + begin, more, channel, channels, maxima,
                                                  best);
        });
  }

  static void merge(const void* const* cells, const void* const* argmaxes, int64_t count,
                    int64_t channels, bool resume, void* pooled, void* argmax) {
    const T* const* const values = reinterpret_cast<const T* const*>(cells);
    const A* const* const indices = reinterpret_cast<const A* const*>(argmaxes);
    T* const maxima = static_cast<T*>(pooled);
    A* const best = static_cast<A*>(argmax);
    in_turns<kArgmaxCells>(
        values, count, resume, maxima,
        [&](auto width, const T* first, bool resume, int64_t begin, auto more, int64_t channel) {
          const A* const first_argmax = resume ? best : indices[0];
          return merge_of<E, A, decltype(width)>(first, first_argmax, values + begin,
                                                 indices + begin, more, channel, channels, maxima,
                                                 best);
        });
  }

  static void fill_lowest(int64_t channels, void* pooled) {
    for (int64_t c = 0; c < channels; ++c) static_cast<T*>(pooled)[c] = E::kLowest;
  }

  static void gather(const void* map, const void* argmax, int64_t cells, int64_t channels,
                     void* tangent) {
    const T* const features = static_cast<const T*>(map);
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t cell = static_cast<const A*>(argmax)[c];
      const bool is_cell = 0 <= cell && cell < cells;
      static_cast<T*>(tangent)[c] = is_cell ? features[cell * channels + c] : T(0);
    }
  }

  static void scatter(const void* cotangent, const void* argmax, int64_t cells, int64_t channels,
                      int64_t stride, void* sums) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t cell = static_cast<const A*>(argmax)[c];
      if (0 <= cell && cell < cells) {
        static_cast<Sum*>(sums)[cell * stride + c] +=
            E::template to_sum<One>(static_cast<const T*>(cotangent)[c]);
      }
    }
  }

  static constexpr MaximumLoops table() {
    if constexpr (std::is_void_v<Sum>) {
      return {sizeof(T), sizeof(A), 0, max, argmax, merge, fill_lowest, gather, nullptr};
    } else {
      return {sizeof(T), sizeof(A), sizeof(Sum), max, argmax, merge, fill_lowest, gather, scatter};
    }
  }
};

template <class E>
constexpr std::array<MaximumLoops, kArgmaxes> tables() {
  return {Loops<E, int16_t>::table(), Loops<E, int32_t>::table()};
}

}  // namespace

const MaximumTables kMaximumTables = {
    tables<Float<float>>(),      tables<Float<double>>(),
    tables<Bfloat16>(),          tables<Float16>(),
    tables<Integer<int8_t>>(),   tables<Integer<int16_t>>(),
    tables<Integer<int32_t>>(),  tables<Integer<int64_t, int64_t>>(),
    tables<Integer<uint8_t>>(),  tables<Integer<uint16_t>>(),
    tables<Integer<uint32_t>>(), tables<Integer<uint64_t, int64_t>>(),
};

}  // namespace jax_roipool::VECTORS
