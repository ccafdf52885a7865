// What the fuzzing of every family of handlers needs: numbers of any dtype, random ones, and calls
// that must give what is expected or say what is wrong with them.
#pragma once

#include <algorithm>
#include <climits>
#include <cmath>
#include <iomanip>
#include <limits>
#include <map>
#include <optional>
#include <random>
#include <sstream>

#include "ffi_runtime.h"

namespace fuzz {

// A number of any dtype.
using Number = long double;
static_assert(std::numeric_limits<Number>::digits >= 64);

struct Dtype {
  XLA_FFI_DataType type;
  const char* name;
  char kind;  // 'f', 'i' or 'u'
  int bits;
  int mantissa;  // bits of it that are stored

  int64_t item_size() const { return bits / 8; }
  int max_exponent() const { return (1 << (bits - mantissa - 2)) - 1; }
  int min_exponent() const { return 1 - max_exponent(); }
};

inline constexpr Dtype kFloats[] = {
    {XLA_FFI_DataType_F32, "f32", 'f', 32, 23},
    {XLA_FFI_DataType_F64, "f64", 'f', 64, 52},
    {XLA_FFI_DataType_BF16, "bf16", 'f', 16, 7},
    {XLA_FFI_DataType_F16, "f16", 'f', 16, 10},
};
inline constexpr Dtype kIntegers[] = {
    {XLA_FFI_DataType_S8, "s8", 'i', 8, 0},    {XLA_FFI_DataType_S16, "s16", 'i', 16, 0},
    {XLA_FFI_DataType_S32, "s32", 'i', 32, 0}, {XLA_FFI_DataType_S64, "s64", 'i', 64, 0},
    {XLA_FFI_DataType_U8, "u8", 'u', 8, 0},    {XLA_FFI_DataType_U16, "u16", 'u', 16, 0},
    {XLA_FFI_DataType_U32, "u32", 'u', 32, 0}, {XLA_FFI_DataType_U64, "u64", 'u', 64, 0},
};
inline constexpr const Dtype &kF32 = kFloats[0], &kF64 = kFloats[1];
inline constexpr const Dtype &kBf16 = kFloats[2], &kF16 = kFloats[3];
inline constexpr const Dtype &kS16 = kIntegers[1], &kS32 = kIntegers[2];

template <class T>
T load(const char* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline Number decode(const Dtype& dtype, const char* from) {
  uint64_t bits = 0;
  std::memcpy(&bits, from, dtype.item_size());  // little-endian, as XLA's CPUs are
  if (dtype.kind == 'u') return bits;
  const int unused = 64 - dtype.bits;
  if (dtype.kind == 'i') return static_cast<int64_t>(bits << unused) >> unused;
  if (dtype.bits == 32) return load<float>(from);
  if (dtype.bits == 64) return load<double>(from);
  const Number sign = bits >> 15 ? -1 : 1;
  const int exponent = (bits & 0x7FFF) >> dtype.mantissa;
  const int hidden = 1 << dtype.mantissa, fraction = bits & (hidden - 1);
  if (exponent == 2 * dtype.max_exponent() + 1) return fraction ? NAN : sign * INFINITY;
  const int first_bit = (exponent == 0 ? 0 : exponent - 1) + dtype.min_exponent() - dtype.mantissa;
  return sign * std::ldexp(Number(exponent == 0 ? fraction : fraction + hidden), first_bit);
}

inline std::vector<Number> decode(const Dtype& dtype, const Array& array) {
  std::vector<Number> numbers(array.count());
  for (size_t i = 0; i < numbers.size(); ++i) {
    numbers[i] = decode(dtype, array.data.get() + i * dtype.item_size());
  }
  return numbers;
}

inline const Dtype& sum_dtype(const Dtype& dtype) { return dtype.bits > 32 ? kF64 : kF32; }

class Random {
 public:
  explicit Random(uint64_t seed) : bits_(seed) {}
  uint64_t bits() { return bits_(); }
  int64_t below(int64_t limit) { return bits_() % limit; }
  int64_t in(int64_t first, int64_t last) { return first + below(last - first + 1); }
  bool one_in(int64_t n) { return below(n) == 0; }
  template <class Choices>
  auto of(const Choices& choices) {
    return std::begin(choices)[below(std::size(choices))];
  }

 private:
  std::mt19937_64 bits_;
};

// A source of floats, as bits, that have one of `range` exponents from `lowest` on, as they are
// stored.
inline std::function<uint64_t()> similar_floats(Random& random, const Dtype& dtype, int64_t lowest,
                                                int64_t range) {
  const uint64_t sign = uint64_t{1} << (dtype.bits - 1), hidden = uint64_t{1} << dtype.mantissa;
  return [&random, sign, hidden, lowest, range] {
    const uint64_t mantissas[] = {0, 1, hidden / 2, hidden - 1, random.bits() % hidden};
    return (random.bits() & sign) | (lowest + random.below(range)) * hidden | random.of(mantissas);
  };
}

// A source of elements of one dtype, as bits.
inline std::function<uint64_t()> elements(Random& random, const Dtype& dtype) {
  const uint64_t all = ~uint64_t{0} >> (64 - dtype.bits), sign = all - all / 2;
  std::vector<uint64_t> special = {0, 1, all / 2, all / 2 + 1, all, all / 2 - 1, all / 2 + 2};
  const uint64_t hidden = uint64_t{1} << dtype.mantissa;
  const int64_t exponents = dtype.kind == 'f' ? 2 * dtype.max_exponent() + 1 : 1;
  if (dtype.kind == 'f') {
    const uint64_t infinity = exponents * hidden, one = dtype.max_exponent() * hidden;
    special = {0, 1, hidden - 1, hidden, one, one + 1, infinity - 1, infinity};
    special.push_back(infinity + 1);  // a signaling NaN
    special.push_back(infinity + hidden / 2);
    special.push_back(infinity + hidden - 1);  // a NaN that is not to be rounded up
    for (int i = special.size() - 1; i >= 0; --i) special.push_back(special[i] | sign);
  }
  switch (random.below(4)) {
    case 0: {  // ties everywhere
      std::vector<uint64_t> few;
      for (int64_t i = random.below(3); i >= 0; --i) few.push_back(random.of(special));
      return [&random, few] { return random.of(few); };
    }
    case 1: return [&random, special] { return random.of(special); };
    case 2:  // numbers of about the same size, so that sums must be rounded, often from a tie
      if (dtype.kind == 'f') {
        const int64_t lowest = random.below(exponents);
        return similar_floats(random, dtype, lowest, std::min<int64_t>(exponents - lowest, 12));
      }
      [[fallthrough]];
    default: return [&random] { return random.bits(); };
  }
}

inline void fill(Array& array, const std::function<uint64_t()>& next) {
  for (int64_t i = 0; i < array.count(); ++i) {
    const uint64_t bits = next();
    std::memcpy(array.data.get() + i * array.item_size, &bits, array.item_size);
  }
}

inline int32_t hostile(Random& random, int64_t size) {
  const int64_t far[] = {INT_MIN, INT_MIN + 1, SHRT_MIN, SHRT_MAX, INT_MAX};
  const int64_t around[] = {-2, -1, 0, size - 1, size, size + 1, random.of(far), random.of(far)};
  if (random.one_in(4)) return static_cast<int32_t>(random.in(0, size));
  return static_cast<int32_t>(random.of(around));
}

// A source of indices of images, some of which a group of `num_images` does not have.
inline std::function<int32_t()> image_indices(Random& random, int64_t num_images) {
  if (random.one_in(12)) {
    return [&random, num_images]() -> int32_t {
      return random.one_in(2) ? -1 - random.below(3) : num_images + random.below(3);
    };
  }
  const bool is_hostile = random.one_in(3) || num_images == 0;
  return [&random, num_images, is_hostile]() -> int32_t {
    return is_hostile ? hostile(random, num_images) : random.below(num_images);
  };
}

struct Target {
  const char* name;
  Handler* handler;
  size_t args;
  std::vector<const char*> names;  // of the operands, and then of the results
};

// Whether a case is one of the few with arrays of 4 MiB and more, which take seconds.
inline bool is_large(uint64_t number) { return number % 128 == 127; }

// What the arrays of a call are, by their names.
class Signature {
 public:
  virtual ~Signature() = default;
  virtual const Dtype& dtype(const std::string& name) const = 0;
  virtual std::vector<int64_t> dims(const std::string& name) const = 0;
  virtual Attributes attributes(const Target& target) const = 0;

  Array make(const std::string& name) const {
    return {dtype(name).type, dtype(name).item_size(), dims(name)};
  }
  std::vector<Array> zeros(const Target& target) const {
    std::vector<Array> arrays;
    for (const char* const name : target.names) {
      arrays.push_back(make(name));
      std::memset(arrays.back().data.get(), 0, arrays.back().bytes());
    }
    return arrays;
  }
};

inline std::string text(const Array& array) {
  std::string text;
  for (const int64_t size : array.dims) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

// Operands of all handlers of a family, and what must come out.
class Case {
 public:
  Case(const Case&) = delete;
  virtual ~Case() = default;

  void check(const Target& target, const std::vector<Pool*>& pools) {
    const std::vector<Array> first = *results(target, *pools[0]);
    compare(target, *pools[0], first);
    for (size_t i = 1; i < pools.size(); ++i) {
      if (bits(*results(target, *pools[i])) == bits(first)) continue;
      fail(describe(target, *pools[i]) + ": other bits than with pool " + pools[0]->name);
    }
    Pool& pool = *random_.of(pools);
    // XLA's headers need memory where a pool refuses a task, and end the process without it.
    if (allocations_fail_ && pool.start != Start::kRefused) {
      check_failing_allocations(target, pool, first);
    }
  }

  // Operands, and then garbage for results.
  std::vector<Array> arrays(const Target& target) const {
    std::vector<Array> arrays;
    for (size_t i = 0; i < target.names.size(); ++i) {
      arrays.push_back(signature().make(target.names[i]));
      if (i >= target.args) continue;
      std::memcpy(arrays[i].data.get(), inputs_.at(target.names[i]).data.get(), arrays[i].bytes());
    }
    return arrays;
  }

  virtual const Signature& signature() const = 0;

 protected:
  explicit Case(uint64_t number)
      : random_(number),
        number_(number),
        flush_(random_.below(4) > 0),
        allocations_fail_(random_.one_in(4)) {}

  // The operand that the handler must refuse, or none.
  virtual std::string wrong_operand(const Target& target) const = 0;

  Random random_;
  std::map<std::string, Array> inputs_;
  std::map<std::string, std::vector<Number>> expected_;

 private:
  // Each allocation in turn fails. The call then does without the memory, or says that it needs it.
  void check_failing_allocations(const Target& target, Pool& pool,
                                 const std::vector<Array>& wanted) const {
    for (int64_t failing = 0, has_failed = true; has_failed; ++failing) {
      Outcome outcome;
      const auto got = results(target, pool, failing, &outcome);
      has_failed = outcome.allocation_has_failed;
      if (!got || bits(*got) == bits(wanted)) continue;
      fail(describe(target, pool) + ": other bits if allocation " + std::to_string(failing) +
           " fails");
    }
  }

  // No arrays if the call is wrong, and the handler has said so. Nothing if it needs the memory of
  // the allocation that has failed.
  std::optional<std::vector<Array>> results(const Target& target, Pool& pool, int64_t failing = -1,
                                            Outcome* outcome_of_call = nullptr) const {
    std::vector<Array> arrays = this->arrays(target);
    const Outcome outcome = call(target.handler, pool, arrays, target.args,
                                 signature().attributes(target), flush_, failing);
    if (outcome_of_call != nullptr) *outcome_of_call = outcome;
    if (outcome.allocation_has_failed && outcome.code == XLA_FFI_Error_Code_RESOURCE_EXHAUSTED &&
        outcome.message.rfind(std::string(target.name) + ": out of memory; ", 0) == 0) {
      return std::nullopt;
    }

    std::string wanted = wrong_operand(target);
    if (!wanted.empty()) wanted = std::string(target.name) + ": " + wanted + " must be ";
    if (outcome.message.rfind(wanted, 0) != 0 || wanted.empty() != outcome.message.empty()) {
      fail(describe(target, pool) + ": error \"" + outcome.message + "\"");
    }
    if (!outcome.message.empty()) return std::vector<Array>();
    arrays.erase(arrays.begin(), arrays.begin() + target.args);
    return arrays;
  }

  static std::string bits(const std::vector<Array>& arrays) {
    std::string bits;
    for (const Array& array : arrays) bits.append(array.data.get(), array.bytes());
    return bits;
  }

  void compare(const Target& target, const Pool& pool, const std::vector<Array>& results) const {
    for (size_t result = 0; result < results.size(); ++result) {
      const std::string name = target.names[target.args + result];
      const std::vector<Number>& expected = expected_.at(name);
      const std::vector<Number> got = decode(signature().dtype(name), results[result]);
      for (size_t i = 0; i < got.size(); ++i) {
        if (got[i] == expected[i] && std::signbit(got[i]) == std::signbit(expected[i])) continue;
        if (std::isnan(got[i]) && std::isnan(expected[i])) continue;
        std::ostringstream out;
        out << std::setprecision(20) << name << " has " << got[i] << " at " << i << ", not "
            << expected[i];
        fail(describe(target, pool) + ": " + out.str());
      }
    }
  }

  std::string describe(const Target& target, const Pool& pool) const {
    std::string description = "case " + std::to_string(number_) + ", " + target.name;
    for (const std::string name : target.names) {
      const std::string dtype = signature().dtype(name).name;
      description += ", " + name + " " + dtype + text(signature().make(name));
    }
    for (const auto& [name, value] : signature().attributes(target)) {
      const int64_t number =
          std::visit([](auto value) { return static_cast<int64_t>(value); }, value);
      description += ", " + name + " " + std::to_string(number);
    }
    return description + ", pool " + pool.name;
  }

  const uint64_t number_;
  const bool flush_, allocations_fail_;
};

// The error must name an operand; this one, if `name` is not empty.
inline void expect_error(const Target& target, std::vector<Array> arrays,
                         const Attributes& attributes, const std::string& name) {
  static Pool pool("none", 0, Start::kNever);
  const std::string error =
      call(target.handler, pool, arrays, target.args, attributes, /*flush_subnormals=*/true)
          .message;
  if (error.rfind(target.name + (": " + name), 0) == 0 &&
      error.find(" must be ") != std::string::npos) {
    return;
  }
  std::string got;
  for (size_t i = 0; i < arrays.size(); ++i) got += target.names[i] + text(arrays[i]) + " ";
  fail(std::string(target.name) + "(" + got + "): no error that names " +
       (name.empty() ? "an operand" : name) + ", but \"" + error + "\"");
}

// Of a call with all operands zero.
inline void expect_error(const Target& target, const Signature& signature,
                         const std::string& name) {
  expect_error(target, signature.zeros(target), signature.attributes(target), name);
}

// Of a right call but for the array number `place`.
inline void expect_error(const Target& target, const Signature& right, const std::string& name,
                         size_t place, Array wrong) {
  std::vector<Array> arrays = right.zeros(target);
  arrays[place] = std::move(wrong);
  expect_error(target, std::move(arrays), right.attributes(target), name);
}

// Each array of a right call in turn is of another rank, size or dtype. The array number `map` may
// have any number of images, rows and columns.
inline void check_wrong_arrays(const Target& target, const Signature& right, size_t map,
                               bool may_be_integers) {
  constexpr std::pair<XLA_FFI_DataType, int64_t> kDtypes[] = {{XLA_FFI_DataType_PRED, 1},
                                                              {XLA_FFI_DataType_F8E4M3FN, 1},
                                                              {XLA_FFI_DataType_C64, 8},
                                                              {XLA_FFI_DataType_U32, 4}};
  for (size_t i = 0; i < target.names.size(); ++i) {
    const Array is = right.make(target.names[i]);
    const auto expect_error_with = [&](XLA_FFI_DataType type, int64_t item_size,
                                       std::vector<int64_t> dims, const std::string& name) {
      expect_error(target, right, name, i, Array(type, item_size, std::move(dims)));
    };
    std::vector<std::vector<int64_t>> other_rank(3, is.dims);
    other_rank[0].pop_back();
    other_rank[1].push_back(1);
    other_rank[2].clear();
    for (const auto& dims : other_rank) {
      expect_error_with(is.dtype, is.item_size, dims, target.names[i]);
    }
    for (size_t axis = 0; axis < is.dims.size(); ++axis) {
      if (i == map && 0 < axis && axis < 4) continue;
      std::vector<int64_t> more = is.dims, less = is.dims;
      ++more[axis];
      --less[axis];
      expect_error_with(is.dtype, is.item_size, more, "");
      expect_error_with(is.dtype, is.item_size, less, "");
    }
    for (const auto& [type, item_size] : kDtypes) {
      const bool is_map_of_integers = i == map && may_be_integers && type == XLA_FFI_DataType_U32;
      expect_error_with(type, item_size, is.dims, is_map_of_integers ? "" : target.names[i]);
    }
  }
}

// Handlers that take the same operands, and cases for them.
struct Family {
  std::vector<Target> targets;
  std::unique_ptr<Case> (*make_case)(uint64_t number);
  void (*check_wrong_calls)();
};

extern const Family kMaxima, kSums;

}  // namespace fuzz
