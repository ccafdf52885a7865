#include "elements.h"
#include "loops.h"

namespace jax_roipool::VECTORS {
namespace {

template <class E, class W>
typename W::template Of<typename E::Lane> load(const typename E::Stored* from) {
  return E::template to_lane<W>(load_vector<W>(from));
}

template <class E, class W, class V>
void store(V lane, typename E::Stored* to) {
  store_vector<W>(E::template to_stored<W>(lane), to);
}

// Whether a vector is left of the channels from `channel` on. If they do not fill it, it begins
// earlier: what is larger than nothing before is not larger the second time.
template <class W>
bool next_vector(int64_t& channel, int64_t channels) {
  if (channel >= channels || channels < W::kLanes) return false;
  if (channel + W::kLanes > channels) channel = channels - W::kLanes;
  return true;
}

// pooled[c] = the maximum of first[c] and of the [c] of `count` cells, from `channel` on, for as
// many channels as fill vectors. Returns the first channel that is left. `Count` is an integer, or
// a constant for which the loop unrolls.
template <class E, class W, class Count>
int64_t max_of(const typename E::Stored* first, const typename E::Stored* const* cells, Count count,
               int64_t channel, int64_t channels, typename E::Stored* pooled) {
  using Lanes = typename W::template Of<typename E::Lane>;
  for (; next_vector<W>(channel, channels); channel += W::kLanes) {
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
using Index =
    std::conditional_t<sizeof(typename E::Lane) == 8, int64_t,
                       std::conditional_t<sizeof(typename E::Lane) == 2, int16_t, int32_t>>;

template <class E, class A, class W>
typename W::template Of<Index<E>> load_indices(const A* from) {
  return W::template convert<Index<E>>(load_vector<W>(from));
}

template <class A, class W, class V>
void store_indices(V indices, A* to) {
  store_vector<W>(W::template convert<A>(indices), to);
}

// The same as `max_of`, and argmax[c] = the index of the maximum's cell. With `resume`, `first` is
// what is pooled so far, and has its indices in `argmax`.
template <class E, class A, class W, class Count>
int64_t argmax_of(const typename E::Stored* first, Index<E> first_index, bool resume,
                  const typename E::Stored* const* cells, const int32_t* indices, Count count,
                  int64_t channel, int64_t channels, typename E::Stored* pooled, A* argmax) {
  using Indices = typename W::template Of<Index<E>>;
  for (; next_vector<W>(channel, channels); channel += W::kLanes) {
    auto maximum = load<E, W>(first + channel);
    Indices best =
        resume ? load_indices<E, A, W>(argmax + channel) : Indices(Indices{} + first_index);
    for (int i = 0; i < count; ++i) {
      const auto value = load<E, W>(cells[i] + channel);
      const auto larger = E::is_larger(value, maximum);
      maximum = larger ? value : maximum;
      best = larger ? Indices{} + static_cast<Index<E>>(indices[i]) : best;
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
  for (; next_vector<W>(channel, channels); channel += W::kLanes) {
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

// M are elements in the narrowest lanes, for maxima alone; E have lanes that an index A fits in.
template <class M, class E, class A>
struct Loops {
  using T = typename E::Stored;
  using Sum = typename E::Sum;
  using Wide = VectorsOf<typename E::Lane>;
  using Narrow = VectorsOf<typename M::Lane>;

  // Calls `loop` for the cells in turns: for vectors of channels, and then for the channels that
  // are left. A turn begins with what is pooled so far, or with the first cell, and goes on with at
  // most kCells cells more.
  //
  // `loop` is given a width, what the turn begins with, whether that is what is pooled so far, the
  // number of cells before the others, the number of these others, and the first channel. `loop`
  // returns the first channel that is left.
  template <class Width, int kCells, class Loop>
  static void in_turns(const T* const* cells, int64_t count, bool resume, const T* pooled,
                       Loop loop) {
    for (int64_t begin = 0; begin < count; resume = true) {
      const T* const first = resume ? pooled : cells[begin++];
      const int64_t more = count - begin < kCells ? count - begin : kCells;
      const int64_t channel = with_constant<kCells>(more, [&](auto constant) {
        return loop(Width(), first, resume, begin, constant, int64_t{0});
      });
      loop(One(), first, resume, begin, more, channel);
      begin += more;
    }
  }

  static void max(const void* const* cells, int64_t count, int64_t channels, bool resume,
                  void* pooled) {
    const T* const* const values = reinterpret_cast<const T* const*>(cells);
    T* const maxima = static_cast<T*>(pooled);
    in_turns<Narrow, kMaxCells>(
        values, count, resume, maxima,
        [&](auto width, const T* first, bool, int64_t begin, auto more, int64_t channel) {
          return max_of<M, decltype(width)>(first, values + begin, more, channel, channels, maxima);
        });
  }

  static void argmax(const void* const* cells, const int32_t* indices, int64_t count,
                     int64_t channels, bool resume, void* pooled, void* argmax) {
    const T* const* const values = reinterpret_cast<const T* const*>(cells);
    T* const maxima = static_cast<T*>(pooled);
    A* const best = static_cast<A*>(argmax);
    in_turns<Wide, kArgmaxCells>(
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
    in_turns<Wide, kArgmaxCells>(
        values, count, resume, maxima,
        [&](auto width, const T* first, bool resume, int64_t begin, auto more, int64_t channel) {
          const A* const first_argmax = resume ? best : indices[0];
          return merge_of<E, A, decltype(width)>(first, first_argmax, values + begin,
                                                 indices + begin, more, channel, channels, maxima,
                                                 best);
        });
  }

  static void across(const void* values, const void* rows, const Range* cols, int64_t bins,
                     int64_t width, int64_t channels, void* pooled, void* argmax) {
    for (int64_t bin = 0; bin < bins; ++bin) {
      if (cols[bin].size() == 0) continue;
      const T* const from = static_cast<const T*>(values);
      T* const maxima = static_cast<T*>(pooled) + bin * channels;
      if (rows == nullptr) {
        max_across<Narrow>(from, cols[bin], channels, maxima);
      } else {
        argmax_across<Wide>(from, static_cast<const A*>(rows), cols[bin], width, channels, maxima,
                            static_cast<A*>(argmax) + bin * channels);
      }
    }
  }

  template <class W>
  static void max_across(const T* values, Range cols, int64_t channels, T* pooled) {
    for (int64_t channel = 0; channel < channels; channel += W::kLanes) {
      const T* cell = values + cols.start * channels + channel;
      auto maximum = load<M, W>(cell);
      for (int64_t col = cols.start + 1; col < cols.end; ++col) {
        const auto value = load<M, W>(cell += channels);
        maximum = M::is_larger(value, maximum) ? value : maximum;
      }
      T found[W::kLanes];
      store<M, W>(maximum, found);
      copy<W>(found, channels - channel, pooled + channel);
    }
  }

  template <class W>
  static void argmax_across(const T* values, const A* rows, Range cols, int64_t width,
                            int64_t channels, T* pooled, A* argmax) {
    using Indices = typename W::template Of<Index<E>>;
    for (int64_t channel = 0; channel < channels; channel += W::kLanes) {
      int64_t cell = cols.start * channels + channel;
      auto maximum = load<E, W>(values + cell);
      Indices best_row = load_indices<E, A, W>(rows + cell);
      Indices best_col = Indices{} + static_cast<Index<E>>(cols.start);
      for (int64_t col = cols.start + 1; col < cols.end; ++col) {
        cell += channels;
        const auto value = load<E, W>(values + cell);
        const auto row = load_indices<E, A, W>(rows + cell);
        const auto better =
            E::is_larger(value, maximum) | (E::is_same(value, maximum) & (row < best_row));
        maximum = better ? value : maximum;
        best_row = better ? row : best_row;
        best_col = better ? Indices(Indices{} + static_cast<Index<E>>(col)) : best_col;
      }
      T found[W::kLanes];
      A cells[W::kLanes];
      store<E, W>(maximum, found);
      store_indices<A, W>(Indices(best_row * static_cast<Index<E>>(width) + best_col), cells);
      copy<W>(found, channels - channel, pooled + channel);
      copy<W>(cells, channels - channel, argmax + channel);
    }
  }

  // So many of a vector's elements, or all.
  template <class W, class Value>
  static void copy(const Value (&from)[W::kLanes], int64_t count, Value* to) {
    if (count >= W::kLanes) {
      std::memcpy(to, from, sizeof from);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    }
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
      return {sizeof(T), sizeof(A), 0, max, argmax, merge, across, fill_lowest, gather, nullptr};
    } else {
      return {sizeof(T), sizeof(A), sizeof(Sum), max,    argmax,
              merge,     across,    fill_lowest, gather, scatter};
    }
  }
};

template <class M, class E16, class E32>
constexpr std::array<MaximumLoops, kArgmaxes> tables() {
  return {Loops<M, E16, int16_t>::table(), Loops<M, E32, int32_t>::table()};
}

template <class E>
constexpr std::array<MaximumLoops, kArgmaxes> tables() {
  return tables<E, E, E>();
}

// Of 8 or 16 bits.
template <class T, class L>
constexpr std::array<MaximumLoops, kArgmaxes> narrow_tables() {
  return tables<Integer<T, L>, Integer<T, int16_t>, Integer<T, int32_t>>();
}

template <class Format, class Wide>
constexpr std::array<MaximumLoops, kArgmaxes> half_tables() {
  return tables<Ordered<Format, int16_t>, Ordered<Format, int16_t>, Wide>();
}

}  // namespace

const MaximumTables kMaximumTables = {
    tables<Float<float>>(),
    tables<Float<double>>(),
    half_tables<Bfloat16, WideBfloat16>(),
    half_tables<Float16, Ordered<Float16, int32_t>>(),
    narrow_tables<int8_t, int8_t>(),
    narrow_tables<int16_t, int16_t>(),
    tables<Integer<int32_t, int32_t>>(),
    tables<Integer<int64_t, int64_t>>(),
    narrow_tables<uint8_t, int8_t>(),
    narrow_tables<uint16_t, int16_t>(),
    tables<Integer<uint32_t, int32_t>>(),
    tables<Integer<uint64_t, int64_t>>(),
};

}  // namespace jax_roipool::VECTORS
