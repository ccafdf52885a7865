// Compiled once per set of vector instructions, with VECTORS as the name of the set.
//
// Nothing with a weak symbol may be defined here: no function of the standard library, and no
// inline function or template outside of the anonymous namespace. Of equal weak symbols the linker
// keeps any one, so code that runs on every processor could get the AVX-512 copy. run_sanitized, in
// tests/native, looks for weak symbols.
#include "channel_loops.h"

#include <cstring>
#include <limits>
#include <type_traits>

namespace jax_roipool::VECTORS {
namespace {

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// One element, written as if it were a vector of one. It takes the channels that are left over,
// and everything where the compiler has no vectors.
struct One {
  template <class T>
  using Of = T;
  static constexpr int64_t kLanes = 1;

  template <class To, class From>
  static To convert(From from) {
    return static_cast<To>(from);
  }
};

#if defined(__GNUC__)  // and Clang
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T, int kCount>
struct VectorOf {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};

// As many elements as fill a vector register with lanes of kLaneBytes.
template <int kLaneBytes>
struct Many {
  static constexpr int64_t kLanes = kVectorBytes / kLaneBytes;
  template <class T>
  using Of = typename VectorOf<T, kLanes>::type;

  template <class To, class From>
  static Of<To> convert(From from) {
    return __builtin_convertvector(from, Of<To>);
  }
};
#else
template <int kLaneBytes>
using Many = One;
#endif

// `is_larger` says whether a value takes the place of the maximum of the values before that value.
// The comparisons are written so that a compiler finds few instructions for them.

struct FloatOrder {
  static constexpr bool kHasNan = true;

  template <class V>
  static auto is_larger(V value, V maximum) {
    return ((value <= maximum) == 0) & (maximum == maximum);
  }
  template <class V>
  static auto is_same(V value, V maximum) {
    return (value == maximum) | ((value != value) & (maximum != maximum));
  }
  template <class V>
  static auto are_numbers(V a, V b) {
    return (a <= b) | (a > b);
  }
};

struct IntegerOrder {
  static constexpr bool kHasNan = false;

  template <class V>
  static auto is_larger(V value, V maximum) {
    return value > maximum;
  }
  template <class V>
  static auto is_same(V value, V maximum) {
    return value == maximum;
  }
};

// Elements: the type that is stored, the lane that values are compared in, and the type that
// gradients are summed in. A width, W, is One or Many.

template <class T>
struct Float : FloatOrder {
  using Stored = T;
  using Lane = T;
  using Sum = T;

  template <class W, class V>
  static V to_lane(V stored) {
    return stored;
  }
  template <class W, class V>
  static V to_stored(V lane) {
    return lane + T(0);  // -0 to 0
  }
  static constexpr T kLowest = -std::numeric_limits<T>::infinity();
  static T to_sum(T stored) { return stored; }
};

struct Bfloat16 : FloatOrder {
  using Stored = uint16_t;
  using Lane = float;
  using Sum = float;

  template <class W, class V>
  static auto to_lane(V stored) {
    auto bits = W::template convert<uint32_t>(stored) << 16;
    return bit_cast<typename W::template Of<float>>(bits);
  }
  template <class W, class V>
  static auto to_stored(V lane) {
    auto bits = bit_cast<typename W::template Of<uint32_t>>(lane + 0.0f);
    return W::template convert<uint16_t>(bits >> 16);  // exact: the lane was a bfloat16
  }
  static constexpr uint16_t kLowest = 0xFF80;
  static float to_sum(uint16_t stored) { return to_lane<One>(stored); }
};

// Compared as integers of the same order, in which NaN is the largest.
struct Float16 : IntegerOrder {
  using Stored = uint16_t;
  using Lane = int32_t;
  using Sum = float;

  template <class W, class V>
  static auto to_lane(V stored) {
    auto bits = W::template convert<int32_t>(stored);
    auto magnitude = bits & 0x7FFF;
    auto lane = bits > 0x7FFF ? -magnitude : magnitude;
    return magnitude > 0x7C00 ? (magnitude | 0x7FFF) : lane;
  }
  template <class W, class V>
  static auto to_stored(V lane) {
    return W::template convert<uint16_t>(lane < 0 ? (-lane | 0x8000) : lane);
  }
  static constexpr uint16_t kLowest = 0xFC00;

  static float to_sum(uint16_t stored) {
    const uint32_t sign = (stored & 0x8000u) << 16, magnitude = stored & 0x7FFFu;
    if (magnitude >= 0x7C00) {  // infinity or NaN
      return bit_cast<float>(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
    }
    // The bits of the magnitude, in a float's place for them, are the number times 2^-112.
    const float scaled = bit_cast<float>(magnitude << 13) * 0x1p112f;
    return bit_cast<float>(bit_cast<uint32_t>(scaled) | sign);
  }
};

template <class T, class L = int32_t>
struct Integer : IntegerOrder {
  using Stored = T;
  using Lane = L;
  using Sum = void;

  // The signed integers of a lane hold all integers but unsigned ones of the same width, whose top
  // bit is flipped.
  static constexpr L kFlip =
      std::is_unsigned_v<T> && sizeof(T) == sizeof(L) ? std::numeric_limits<L>::min() : L(0);

  template <class W, class V>
  static auto to_lane(V stored) {
    return W::template convert<L>(stored) ^ kFlip;
  }
  template <class W, class V>
  static auto to_stored(V lane) {
    return W::template convert<T>(lane ^ kFlip);
  }
  static constexpr T kLowest = std::numeric_limits<T>::min();
};

template <class E, class W>
auto load(const typename E::Stored* from) {
  typename W::template Of<typename E::Stored> stored;
  std::memcpy(&stored, from, sizeof stored);
  return E::template to_lane<W>(stored);
}

template <class E, class W, class V>
void store(V lane, typename E::Stored* to) {
  const typename W::template Of<typename E::Stored> stored = E::template to_stored<W>(lane);
  std::memcpy(to, &stored, sizeof stored);
}

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

// An int that is known to the compiler. (The standard library's would have weak symbols.)
template <int kValue>
struct Constant {
  constexpr operator int() const { return kValue; }
};

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
            E::to_sum(static_cast<const T*>(cotangent)[c]);
      }
    }
  }

  static constexpr ChannelLoops table() {
    if constexpr (std::is_void_v<Sum>) {
      return {sizeof(T), sizeof(A), 0, max, argmax, merge, fill_lowest, gather, nullptr};
    } else {
      return {sizeof(T), sizeof(A), sizeof(Sum), max, argmax, merge, fill_lowest, gather, scatter};
    }
  }
};

template <class E>
constexpr std::array<ChannelLoops, kArgmaxes> tables() {
  return {Loops<E, int16_t>::table(), Loops<E, int32_t>::table()};
}

}  // namespace

const Tables kTables = {
    tables<Float<float>>(),      tables<Float<double>>(),
    tables<Bfloat16>(),          tables<Float16>(),
    tables<Integer<int8_t>>(),   tables<Integer<int16_t>>(),
    tables<Integer<int32_t>>(),  tables<Integer<int64_t, int64_t>>(),
    tables<Integer<uint8_t>>(),  tables<Integer<uint16_t>>(),
    tables<Integer<uint32_t>>(), tables<Integer<uint64_t, int64_t>>(),
};

}  // namespace jax_roipool::VECTORS
