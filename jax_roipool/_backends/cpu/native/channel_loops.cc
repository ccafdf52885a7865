// Compiled once per set of vector instructions, with VECTORS as the name of the set.
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

// As many elements as fill a vector register with lanes of that size.
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

// Whether a value takes the place of the maximum of those before it: `is_larger`. It is written so
// that a compiler finds few instructions for it.

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

// Elements: what is stored, the lane that it is compared in, and the type that its gradients are
// summed in. A width, W, is One or Many.

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
  static T lowest() { return -std::numeric_limits<T>::infinity(); }
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
    return W::template convert<uint16_t>(bits >> 16);  // exact: it was a bfloat16
  }
  static uint16_t lowest() { return 0xFF80; }
  static float to_sum(uint16_t stored) { return to_lane<One>(stored); }
};

// Compared as an integer of the same order, in which NaN is the largest.
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
  static uint16_t lowest() { return 0xFC00; }

  static float to_sum(uint16_t stored) {
    const uint32_t sign = (stored & 0x8000u) << 16, magnitude = stored & 0x7FFFu;
    if (magnitude >= 0x7C00) {  // infinity or NaN
      return bit_cast<float>(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
    }
    // Its bits, in a float's place for them, are the number times 2^-112.
    const float scaled = bit_cast<float>(magnitude << 13) * 0x1p112f;
    return bit_cast<float>(bit_cast<uint32_t>(scaled) | sign);
  }
};

template <class T, class L = int32_t>
struct Integer : IntegerOrder {
  using Stored = T;
  using Lane = L;
  using Sum = void;

  // The signed integers of a lane hold all others, but unsigned ones as wide as it: their top bit
  // is flipped.
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
  static T lowest() { return std::numeric_limits<T>::min(); }
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

// The maximum of `first` and `count` cells, of as many of the channels as fill vectors. Returns the
// first channel that is left. `Count` is an int, or a constant for which the loop unrolls.
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
      maximum = numbers ? maximum : Lanes{} + std::numeric_limits<typename E::Lane>::quiet_NaN();
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

// The same with indices. That of `first` is already in `argmax` if it is a pooled cell.
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

// The same for cells that have an index for each channel, and come in any order.
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
  return loop(std::integral_constant<int, kLimit>());
}

// So many cells are read side by side; more of them would not leave the other registers enough.
constexpr int kMaxCells = 8;
constexpr int kArgmaxCells = 4;

template <class E, class A>
struct Loops {
  using T = typename E::Stored;
  using Sum = typename E::Sum;
  using Wide = Many<sizeof(typename E::Lane)>;

  static void max(const void* const* cells, int64_t count, int64_t channels, bool resume,
                  void* pooled_) {
    T* const pooled = static_cast<T*>(pooled_);
    const T* const* cell = reinterpret_cast<const T* const*>(cells);
    const T* const* const end = cell + count;
    while (cell != end) {
      const T* const first = resume ? pooled : *cell++;
      const int64_t more = end - cell < kMaxCells ? end - cell : kMaxCells;
      const int64_t channel = with_constant<kMaxCells>(more, [&](auto constant) {
        return max_of<E, Wide>(first, cell, constant, 0, channels, pooled);
      });
      max_of<E, One>(first, cell, more, channel, channels, pooled);
      cell += more;
      resume = true;
    }
  }

  static void argmax(const void* const* cells, const int32_t* index, int64_t count,
                     int64_t channels, bool resume, void* pooled_, void* argmax_) {
    T* const pooled = static_cast<T*>(pooled_);
    A* const argmax = static_cast<A*>(argmax_);
    const T* const* cell = reinterpret_cast<const T* const*>(cells);
    const T* const* const end = cell + count;
    while (cell != end) {
      const T* const first = resume ? pooled : *cell++;
      const int32_t first_index = resume ? 0 : *index++;
      const int64_t more = end - cell < kArgmaxCells ? end - cell : kArgmaxCells;
      const int64_t channel = with_constant<kArgmaxCells>(more, [&](auto constant) {
        return argmax_of<E, A, Wide>(first, first_index, resume, cell, index, constant, 0, channels,
                                     pooled, argmax);
      });
      argmax_of<E, A, One>(first, first_index, resume, cell, index, more, channel, channels, pooled,
                           argmax);
      cell += more;
      index += more;
      resume = true;
    }
  }

  static void merge(const void* const* cells, const void* const* argmaxes, int64_t count,
                    int64_t channels, bool resume, void* pooled_, void* argmax_) {
    T* const pooled = static_cast<T*>(pooled_);
    A* const argmax = static_cast<A*>(argmax_);
    const T* const* cell = reinterpret_cast<const T* const*>(cells);
    const T* const* const end = cell + count;
    const A* const* index = reinterpret_cast<const A* const*>(argmaxes);
    while (cell != end) {
      const T* const first = resume ? pooled : *cell++;
      const A* const first_argmax = resume ? argmax : *index++;
      const int64_t more = end - cell < kArgmaxCells ? end - cell : kArgmaxCells;
      const int64_t channel = with_constant<kArgmaxCells>(more, [&](auto constant) {
        return merge_of<E, A, Wide>(first, first_argmax, cell, index, constant, 0, channels, pooled,
                                    argmax);
      });
      merge_of<E, A, One>(first, first_argmax, cell, index, more, channel, channels, pooled,
                          argmax);
      cell += more;
      index += more;
      resume = true;
    }
  }

  static void fill_lowest(int64_t channels, void* pooled) {
    for (int64_t c = 0; c < channels; ++c) static_cast<T*>(pooled)[c] = E::lowest();
  }

  static void gather(const void* map_, const void* argmax, int64_t cells, int64_t channels,
                     void* tangent) {
    const T* const map = static_cast<const T*>(map_);
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t cell = static_cast<const A*>(argmax)[c];
      const bool is_cell = 0 <= cell && cell < cells;
      static_cast<T*>(tangent)[c] = is_cell ? map[cell * channels + c] : T(0);
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

extern const Tables kTables;
const Tables kTables = {
    tables<Float<float>>(),      tables<Float<double>>(),
    tables<Bfloat16>(),          tables<Float16>(),
    tables<Integer<int8_t>>(),   tables<Integer<int16_t>>(),
    tables<Integer<int32_t>>(),  tables<Integer<int64_t, int64_t>>(),
    tables<Integer<uint8_t>>(),  tables<Integer<uint16_t>>(),
    tables<Integer<uint32_t>>(), tables<Integer<uint64_t, int64_t>>(),
};

}  // namespace jax_roipool::VECTORS
