// The types of elements, and vectors of them: what the loops in *_loops.cc are made of. They are
// compiled once per set of vector instructions, with VECTORS as the name of the set.
//
// Nothing with a weak symbol may be defined here or there: no function of the standard library, and
// no inline function or template outside of the anonymous namespace. Of equal weak symbols the
// linker keeps any one, so code that runs on every processor could get the AVX-512 copy.
// run_sanitized, in tests/native, looks for weak symbols.
#pragma once

#include <cstdint>
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

// An int that is known to the compiler. (The standard library's would have weak symbols.)
template <int kValue>
struct Constant {
  constexpr operator int() const { return kValue; }
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

template <int kCount>
struct Many {
  static constexpr int64_t kLanes = kCount;
  template <class T>
  using Of = typename VectorOf<T, kLanes>::type;

  template <class To, class From>
  static Of<To> convert(From from) {
    return __builtin_convertvector(from, Of<To>);
  }
};

// As many elements as fill a vector register, in lanes of that type.
template <class Lane>
using VectorsOf = Many<kVectorBytes / sizeof(Lane)>;
#else
template <class Lane>
using VectorsOf = One;
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
// gradients and weighted values are summed in. A width, W, is One or Many.

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
  template <class W, class V>
  static V to_sum(V stored) {
    return stored;
  }
  template <class W, class V>
  static V from_sum(V sum) {
    return sum;
  }
};

struct Bfloat16 {
  using Stored = uint16_t;
  using Sum = float;
  static constexpr uint16_t kLowest = 0xFF80;

  template <class W, class V>
  static auto to_sum(V stored) {
    const auto bits = W::template convert<uint32_t>(stored) << 16;
    return bit_cast<typename W::template Of<float>>(bits);
  }
  template <class W, class V>
  static auto from_sum(V sum) {
    const auto bits = bit_cast<typename W::template Of<uint32_t>>(sum);
    const auto nearest = bits + 0x7FFFu + (bits >> 16 & 1u);  // of two, the even one
    const auto nan = bits | 0x400000u;
    return W::template convert<uint16_t>((sum == sum ? nearest : nan) >> 16);
  }
};

struct Float16 {
  using Stored = uint16_t;
  using Sum = float;
  static constexpr uint16_t kLowest = 0xFC00;

  template <class W, class V>
  static auto to_sum(V stored) {
    using Bits = typename W::template Of<uint32_t>;
    using Floats = typename W::template Of<float>;
    const Bits bits = W::template convert<uint32_t>(stored);
    const Bits sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7FFFu;
    // In a float's place for them, the bits of the magnitude are the number times 2^-112.
    const Bits number = bit_cast<Bits>(bit_cast<Floats>(magnitude << 13) * 0x1p112f);
    const Bits other = 0x7F800000u | (magnitude & 0x3FFu) << 13;  // infinity or NaN
    return bit_cast<Floats>((magnitude < 0x7C00u ? number : other) | sign);
  }
  template <class W, class V>
  static auto from_sum(V sum) {
    using Bits = typename W::template Of<uint32_t>;
    using Floats = typename W::template Of<float>;
    const Bits bits = bit_cast<Bits>(sum), magnitude = bits & 0x7FFFFFFFu;
    // To the nearest and, of two, to the even one; past the largest number this is infinity.
    const Bits normal = (magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
    // The unit in the last place of numbers about a half is the smallest subnormal.
    const Bits subnormal = bit_cast<Bits>(bit_cast<Floats>(magnitude) + 0.5f) - 0x3F000000u;
    Bits rounded = magnitude < (113u << 23) ? subnormal : normal;
    rounded = magnitude < (143u << 23) ? rounded : Bits{} + 0x7C00u;
    rounded = magnitude > 0x7F800000u ? Bits{} + 0x7E00u : rounded;
    return W::template convert<uint16_t>(rounded | (bits >> 16 & 0x8000u));
  }
};

// Either of them, compared as integers of the same order, in which NaN is the largest.
template <class Format, class L>
struct Ordered : Format, IntegerOrder {
  using Lane = L;

  template <class W, class V>
  static auto to_lane(V stored) {
    const auto bits = W::template convert<L>(bit_cast<typename W::template Of<int16_t>>(stored));
    const auto magnitude = bits & 0x7FFF;
    const auto lane = bits < 0 ? -magnitude : magnitude;
    constexpr int16_t kInfinity = Format::kLowest & 0x7FFF;
    return magnitude > kInfinity ? (magnitude | 0x7FFF) : lane;
  }
  template <class W, class V>
  static auto to_stored(V lane) {
    constexpr int16_t kSign = std::numeric_limits<int16_t>::min();
    return W::template convert<uint16_t>(lane < 0 ? (-lane | kSign) : lane);
  }
};

// A bfloat16 in a lane of 32 bits is a float, which takes fewer steps to compare.
struct WideBfloat16 : Bfloat16, FloatOrder {
  using Lane = float;

  template <class W, class V>
  static auto to_lane(V stored) {
    return to_sum<W>(stored);
  }
  template <class W, class V>
  static auto to_stored(V lane) {
    auto bits = bit_cast<typename W::template Of<uint32_t>>(lane + 0.0f);
    return W::template convert<uint16_t>(bits >> 16);  // exact: the lane was a bfloat16
  }
};

template <class T, class L>
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

// As many as W has, from and to any address.
template <class W, class T>
typename W::template Of<T> load_vector(const T* from) {
  typename W::template Of<T> vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class W, class T>
void store_vector(typename W::template Of<T> vector, T* to) {
  std::memcpy(to, &vector, sizeof vector);
}

}  // namespace
}  // namespace jax_roipool::VECTORS
