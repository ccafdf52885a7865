// Calls the four handlers as XLA does, on random and on hostile inputs, and compares what they
// compute with loops that are too plain to be wrong. Run it under sanitizers: `run_sanitized`.
//
//   fuzz_handlers [cases [first case]]
//   fuzz_handlers --vectors        prints the set of vector instructions in use
//   fuzz_handlers --no-vectors     checks that every call is an error if a set is asked for that
//                                  there is not
//
// Case number i is the same in every run, so one that has failed can be run alone.
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <csignal>
#include <iomanip>
#include <limits>
#include <map>
#include <random>
#include <sstream>

#include "ffi_runtime.h"

extern "C" {
XLA_FFI_Error* jax_roipool_cpu_max_v2(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_roipool_cpu_argmax_v2(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_roipool_cpu_gather_v2(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_roipool_cpu_scatter_v2(XLA_FFI_CallFrame*);
const char* jax_roipool_cpu_vectors();
}

namespace fuzz {
namespace {

constexpr unsigned kWatchdogSeconds = 60;  // for one case

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

constexpr Dtype kFloats[] = {
    {XLA_FFI_DataType_F32, "f32", 'f', 32, 23},
    {XLA_FFI_DataType_F64, "f64", 'f', 64, 52},
    {XLA_FFI_DataType_BF16, "bf16", 'f', 16, 7},
    {XLA_FFI_DataType_F16, "f16", 'f', 16, 10},
};
constexpr Dtype kIntegers[] = {
    {XLA_FFI_DataType_S8, "s8", 'i', 8, 0},    {XLA_FFI_DataType_S16, "s16", 'i', 16, 0},
    {XLA_FFI_DataType_S32, "s32", 'i', 32, 0}, {XLA_FFI_DataType_S64, "s64", 'i', 64, 0},
    {XLA_FFI_DataType_U8, "u8", 'u', 8, 0},    {XLA_FFI_DataType_U16, "u16", 'u', 16, 0},
    {XLA_FFI_DataType_U32, "u32", 'u', 32, 0}, {XLA_FFI_DataType_U64, "u64", 'u', 64, 0},
};
constexpr const Dtype &kF32 = kFloats[0], &kF64 = kFloats[1];
constexpr const Dtype &kBf16 = kFloats[2], &kF16 = kFloats[3];
constexpr const Dtype &kS16 = kIntegers[1], &kS32 = kIntegers[2];

template <class T>
T load(const char* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

Number decode(const Dtype& dtype, const char* from) {
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

std::vector<Number> decode(const Dtype& dtype, const Array& array) {
  std::vector<Number> numbers(array.count());
  for (size_t i = 0; i < numbers.size(); ++i) {
    numbers[i] = decode(dtype, array.data.get() + i * dtype.item_size());
  }
  return numbers;
}

const Dtype& sum_dtype(const Dtype& dtype) { return dtype.bits > 32 ? kF64 : kF32; }

Number lowest(const Dtype& dtype) {
  if (dtype.kind == 'f') return -INFINITY;
  return dtype.kind == 'u' ? 0 : -std::ldexp(Number(1), dtype.bits - 1);
}

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

// A source of elements of one dtype, as bits.
std::function<uint64_t()> elements(Random& random, const Dtype& dtype) {
  const uint64_t all = ~uint64_t{0} >> (64 - dtype.bits), sign = all - all / 2;
  std::vector<uint64_t> special = {0, 1, all / 2, all / 2 + 1, all, all / 2 - 1, all / 2 + 2};
  const uint64_t hidden = uint64_t{1} << dtype.mantissa;
  const int64_t exponents = dtype.kind == 'f' ? 2 * dtype.max_exponent() + 1 : 1;
  if (dtype.kind == 'f') {
    const uint64_t infinity = exponents * hidden, one = dtype.max_exponent() * hidden;
    special = {0, 1, hidden - 1, hidden, one, one + 1, infinity - 1, infinity};
    special.push_back(infinity + 1);  // a signaling NaN
    special.push_back(infinity + hidden / 2);
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
        const int64_t range = std::min<int64_t>(exponents - lowest, 12);
        return [&random, sign, hidden, lowest, range] {
          const uint64_t mantissas[] = {0, 1, hidden / 2, hidden - 1, random.bits() % hidden};
          return (random.bits() & sign) | (lowest + random.below(range)) * hidden |
                 random.of(mantissas);
        };
      }
      [[fallthrough]];
    default: return [&random] { return random.bits(); };
  }
}

void fill(Array& array, const std::function<uint64_t()>& next) {
  for (int64_t i = 0; i < array.count(); ++i) {
    const uint64_t bits = next();
    std::memcpy(array.data.get() + i * array.item_size, &bits, array.item_size);
  }
}

struct Sizes {
  int64_t G, n, H, W, C, K, P, Q;

  int64_t cells() const { return H * W; }
  int64_t lanes() const { return 1 + 2 * P + 2 * Q; }
};

Sizes random_sizes(Random& random, uint64_t number) {
  constexpr int64_t kAroundVectors[] = {1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100};
  if (number % 128 == 127) return {1, 1, 33, 32, 512, 22, 7, 7};  // 4 MiB and more in float64
  Sizes s = {random.in(1, 3), random.in(1, 3), random.in(1, 8), random.in(1, 8), 1, 1, 1, 1};
  s.C = random.of(kAroundVectors);
  s.K = random.in(1, 6);
  s.P = random.in(1, 4);
  s.Q = random.in(1, 4);
  if (random.one_in(4)) {  // many cells in a bin
    s = {1, s.n, random.in(1, 40), random.in(1, 40), random.in(1, 9), s.K, s.P, s.Q};
  }
  if (random.one_in(4)) {  // and each cell in many bins
    s = {1, 1 + random.one_in(3), random.in(8, 32), random.in(8, 32), random.in(1, 20), 0, 0, 0};
    s.K = random.in(32, 48);
    s.P = random.in(1, 2);
    s.Q = random.in(1, 2);
  }
  if (random.one_in(16)) {  // about as many cells as an int16 has indices for
    s = {1, 1, random.in(1, 2), 0, random.in(1, 2), 2, 2, s.Q};
    s.W = (SHRT_MAX + 1) / s.H + random.in(0, 1);
  }
  int64_t* const any[] = {&s.G, &s.n, &s.H, &s.W, &s.C, &s.K, &s.P, &s.Q};
  if (random.one_in(6)) *random.of(any) = 0;
  return s;
}

// Bins of one axis of one RoI: edges inside of the map, at most one cell of overlap.
void roi_like_bins(Random& random, int64_t size, int64_t bins, int32_t* start, int32_t* end) {
  const bool is_whole = random.below(4) > 0;
  const int64_t first = random.below(is_whole ? 3 : size + 2) - 1;
  const int64_t length = is_whole ? size : random.below(size + 3);
  const auto edge = [&](int64_t cell) { return std::clamp<int64_t>(first + cell, 0, size); };
  for (int64_t i = 0; i < bins; ++i) {
    start[i] = edge(i * length / bins);
    end[i] = edge(((i + 1) * length + bins - 1) / bins);
  }
}

int32_t hostile(Random& random, int64_t size) {
  const int64_t far[] = {INT_MIN, INT_MIN + 1, SHRT_MIN, SHRT_MAX, INT_MAX};
  const int64_t around[] = {-2, -1, 0, size - 1, size, size + 1, random.of(far), random.of(far)};
  if (random.one_in(4)) return static_cast<int32_t>(random.in(0, size));
  return static_cast<int32_t>(random.of(around));
}

struct Target {
  const char* name;
  Handler* handler;
  size_t args;
  std::vector<const char*> names;  // of the operands, and then of the results

  Outcome call(Pool& pool, std::vector<Array>& arrays, bool empty_is_lowest, bool flush,
               int64_t failing = -1) const {
    const bool has_attribute = std::string(names[args]) == "pooled";
    return fuzz::call(handler, pool, arrays, args,
                      has_attribute ? std::optional(empty_is_lowest) : std::nullopt, flush,
                      failing);
  }
};

const Target kMax = {
    "jax_roipool_cpu_max_v2", jax_roipool_cpu_max_v2, 2, {"features", "edges", "pooled"}};
const Target kArgmax = {"jax_roipool_cpu_argmax_v2",
                        jax_roipool_cpu_argmax_v2,
                        2,
                        {"features", "edges", "pooled", "argmax"}};
const Target kGather = {"jax_roipool_cpu_gather_v2",
                        jax_roipool_cpu_gather_v2,
                        3,
                        {"features", "argmax", "edges", "tangent"}};
const Target kScatter = {"jax_roipool_cpu_scatter_v2",
                         jax_roipool_cpu_scatter_v2,
                         3,
                         {"cotangent", "argmax", "edges", "gradient"}};
const Target* const kTargets[] = {&kMax, &kArgmax, &kGather, &kScatter};

Array make(const std::string& name, const Sizes& s, const Dtype& dtype, const Dtype& argmax) {
  const auto of = [](const Dtype& dtype, std::vector<int64_t> dims) {
    return Array(dtype.type, dtype.item_size(), std::move(dims));
  };
  if (name == "features") return of(dtype, {s.G, s.n, s.H, s.W, s.C});
  if (name == "gradient") return of(sum_dtype(dtype), {s.G, s.n, s.H, s.W, s.C});
  if (name == "edges") return of(kS32, {s.G, s.K, s.lanes()});
  return of(name == "argmax" ? argmax : dtype, {s.G, s.K, s.P, s.Q, s.C});
}

std::string text(const Array& array) {
  std::string text;
  for (const int64_t size : array.dims) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

// Inputs of all handlers, and what must come out.
class Case {
 public:
  explicit Case(uint64_t number)
      : number_(number),
        random_(number),
        dtype_(number % 128 == 127 ? kF64
               : random_.below(2)  ? random_.of(kFloats)
                                   : random_.of(kIntegers)),
        argmax_dtype_(random_.below(2) ? kS16 : kS32),
        s_(random_sizes(random_, number)),
        empty_is_lowest_(random_.below(2)),
        flush_(random_.below(4) > 0),
        allocations_fail_(random_.one_in(4)) {
    for (const char* name : {"features", "edges", "cotangent", "argmax"}) {
      inputs_.emplace(name, make(name, s_, dtype_, argmax_dtype_));
    }
    fill(inputs_.at("features"), elements(random_, dtype_));
    fill(inputs_.at("cotangent"), elements(random_, dtype_));
    const bool hostile_argmax = random_.one_in(2);
    fill(inputs_.at("argmax"), [&] {
      return hostile_argmax ? hostile(random_, s_.cells()) : random_.below(s_.cells() + 1) - 1;
    });
    fill_edges();
    expect();
  }

  void check(const std::vector<Pool*>& pools) {
    for (const Target* const each : kTargets) {
      const Target& target = *each;
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
  }

 private:
  // Each allocation in turn fails. The call then does without the memory, or says that it needs it.
  void check_failing_allocations(const Target& target, Pool& pool,
                                 const std::vector<Array>& wanted) {
    for (int64_t failing = 0, has_failed = true; has_failed; ++failing) {
      Outcome outcome;
      const auto got = results(target, pool, failing, &outcome);
      has_failed = outcome.allocation_has_failed;
      if (!got || bits(*got) == bits(wanted)) continue;
      fail(describe(target, pool) + ": other bits if allocation " + std::to_string(failing) +
           " fails");
    }
  }

  void fill_edges() {
    const bool hostile_images = random_.one_in(3), no_images = random_.one_in(12);
    const bool hostile_rows = random_.one_in(3), hostile_cols = random_.one_in(3);
    const bool any_bits = random_.one_in(12);
    Array& edges = inputs_.at("edges");
    if (any_bits) return fill(edges, [&] { return random_.bits(); });
    int32_t* lane = reinterpret_cast<int32_t*>(edges.data.get());
    for (int64_t roi = 0; roi < s_.G * s_.K; ++roi) {
      if (no_images) {
        *lane++ = random_.one_in(2) ? -1 - random_.below(3) : s_.n + random_.below(3);
      } else {
        *lane++ = hostile_images || s_.n == 0 ? hostile(random_, s_.n) : random_.below(s_.n);
      }
      lane = fill_axis(lane, s_.H, s_.P, hostile_rows);
      lane = fill_axis(lane, s_.W, s_.Q, hostile_cols);
    }
  }

  // Returns the end of the starts and ends of the bins.
  int32_t* fill_axis(int32_t* lanes, int64_t size, int64_t bins, bool is_hostile) {
    roi_like_bins(random_, size, bins, lanes, lanes + bins);
    for (int64_t i = 0; is_hostile && i < 2 * bins; ++i) lanes[i] = hostile(random_, size);
    return lanes + 2 * bins;
  }

  // What the contract says, an element of a pooled array after the other.
  void expect() {
    const int32_t* const edges = reinterpret_cast<const int32_t*>(inputs_.at("edges").data.get());
    const std::vector<Number> features = decode(dtype_, inputs_.at("features"));
    const std::vector<Number> cotangent = decode(dtype_, inputs_.at("cotangent"));
    const std::vector<Number> argmax = decode(argmax_dtype_, inputs_.at("argmax"));
    std::vector<Number>&pooled = expected_["pooled"], &firsts = expected_["argmax"];
    std::vector<Number>&tangent = expected_["tangent"], &gradient = expected_["gradient"];
    gradient.resize(features.size());
    for (size_t i = 0; i < cotangent.size(); ++i) {
      const int64_t c = i % s_.C, q = i / s_.C % s_.Q, p = i / s_.C / s_.Q % s_.P;
      const int64_t roi = i / s_.C / s_.Q / s_.P;
      const int32_t* const lanes = edges + roi * s_.lanes();
      const int64_t image_index = lanes[0];
      const int32_t *const rows = lanes + 1, *const cols = rows + 2 * s_.P;
      const bool has_image = 0 <= image_index && image_index < s_.n;
      const int64_t image = (roi / s_.K * s_.n + image_index) * s_.cells();
      const auto at = [&](int64_t cell) { return (image + cell) * s_.C + c; };

      Number maximum = 0;
      int64_t first = -1;
      for (int64_t row = std::max(rows[p], 0);
           has_image && row < std::min<int64_t>(rows[s_.P + p], s_.H); ++row) {
        for (int64_t col = std::max(cols[q], 0); col < std::min<int64_t>(cols[s_.Q + q], s_.W);
             ++col) {
          const Number value = features[at(row * s_.W + col)];
          if (first >= 0 && !(value > maximum) && (!std::isnan(value) || std::isnan(maximum))) {
            continue;
          }
          maximum = value;
          first = row * s_.W + col;
        }
      }
      if (first < 0 && has_image && empty_is_lowest_) maximum = lowest(dtype_);
      pooled.push_back(maximum);
      firsts.push_back(first);

      const bool has_cell = has_image && 0 <= argmax[i] && argmax[i] < s_.cells();
      tangent.push_back(has_cell ? features[at(argmax[i])] : 0);
      if (!has_cell || dtype_.kind != 'f') continue;
      Number& sum = gradient[at(argmax[i])];
      sum = dtype_.bits == 64 ? Number(static_cast<double>(sum) + static_cast<double>(cotangent[i]))
                              : Number(static_cast<float>(sum) + static_cast<float>(cotangent[i]));
    }
  }

  // No arrays if the call is wrong, and the handler has said so. Nothing if it needs the memory of
  // the allocation that has failed.
  std::optional<std::vector<Array>> results(const Target& target, Pool& pool, int64_t failing = -1,
                                            Outcome* outcome_of_call = nullptr) {
    std::vector<Array> arrays;
    for (size_t i = 0; i < target.names.size(); ++i) {
      arrays.push_back(make(target.names[i], s_, dtype_, argmax_dtype_));
      if (i >= target.args) continue;
      std::memcpy(arrays[i].data.get(), inputs_.at(target.names[i]).data.get(), arrays[i].bytes());
    }
    const Outcome outcome = target.call(pool, arrays, empty_is_lowest_, flush_, failing);
    if (outcome_of_call != nullptr) *outcome_of_call = outcome;
    if (outcome.allocation_has_failed && outcome.code == XLA_FFI_Error_Code_RESOURCE_EXHAUSTED &&
        outcome.message.rfind(std::string(target.name) + ": out of memory; ", 0) == 0) {
      return std::nullopt;
    }

    std::string wanted;
    const bool has_argmax = &target != &kMax;
    if (has_argmax && argmax_dtype_.bits == 16 && s_.cells() - 1 > SHRT_MAX) wanted = "argmax";
    if (&target == &kScatter && dtype_.kind != 'f') wanted = "cotangent";
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

  void compare(const Target& target, const Pool& pool, const std::vector<Array>& results) {
    for (size_t result = 0; result < results.size(); ++result) {
      const std::string name = target.names[target.args + result];
      const std::vector<Number>& expected = expected_[name];
      const Dtype& dtype = name == "argmax"     ? argmax_dtype_
                           : name == "gradient" ? sum_dtype(dtype_)
                                                : dtype_;
      const std::vector<Number> got = decode(dtype, results[result]);
      for (size_t i = 0; i < got.size(); ++i) {
        if (got[i] == expected[i] || (std::isnan(got[i]) && std::isnan(expected[i]))) continue;
        std::ostringstream out;
        out << std::setprecision(20) << name << text(results[result]) << " has " << got[i] << " at "
            << i << ", not " << expected[i];
        fail(describe(target, pool) + ": " + out.str());
      }
    }
  }

  std::string describe(const Target& target, const Pool& pool) {
    return "case " + std::to_string(number_) + ", " + target.name + ", " + dtype_.name + " map " +
           text(inputs_.at("features")) + ", " + argmax_dtype_.name + " argmax " +
           text(inputs_.at("argmax")) + ", pool " + pool.name;
  }

  const uint64_t number_;
  Random random_;
  const Dtype dtype_, argmax_dtype_;
  const Sizes s_;
  const bool empty_is_lowest_, flush_, allocations_fail_;
  std::map<std::string, Array> inputs_;
  std::map<std::string, std::vector<Number>> expected_;
};

void check_case(uint64_t number, const std::vector<Pool*>& pools) {
  const FloatEnvironment environment(/*flush=*/false);
  alarm(kWatchdogSeconds);
  Case(number).check(pools);
}

// Eight devices and the tasks of a pool share two threads.
void check_concurrent_calls(uint64_t first, uint64_t cases) {
  Pool pool("shared", 2, Start::kAtOnce);
  std::vector<std::thread> devices;
  for (uint64_t device = 0; device < 8; ++device) {
    devices.emplace_back([&pool, first, cases, device] {
      for (uint64_t i = device; i < cases; i += 8) check_case(first + i, {&pool});
    });
    pool.schedule([&pool, first, device] { check_case(first + device, {&pool}); });
  }
  for (std::thread& device : devices) device.join();
}

// Of a call with all operands zero, but one if `wrong` is given.
void expect_error(const Target& target, const Sizes& s, const Dtype& dtype, const Dtype& argmax,
                  const std::string& name, size_t place = 0, std::optional<Array> wrong = {}) {
  static Pool pool("none", 0, Start::kNever);
  std::vector<Array> arrays;
  for (const char* operand : target.names) {
    arrays.push_back(make(operand, s, dtype, argmax));
    std::memset(arrays.back().data.get(), 0, arrays.back().bytes());
  }
  if (wrong) arrays[place] = *std::move(wrong);
  const std::string error = target.call(pool, arrays, false, true).message;
  if (error.rfind(target.name + (": " + name), 0) == 0 &&
      error.find(" must be ") != std::string::npos) {
    return;
  }
  std::string got;
  for (size_t i = 0; i < arrays.size(); ++i) got += target.names[i] + text(arrays[i]) + " ";
  fail(std::string(target.name) + "(" + got + "): no error that names " +
       (name.empty() ? "an operand" : name) + ", but \"" + error + "\"");
}

void check_wrong_calls() {
  const Sizes right = {2, 3, 4, 5, 6, 7, 2, 3};
  const Sizes huge[] = {{1, 1, 1 << 16, 1 << 15, 0, 1, 1, 1},
                        {1, 1, int64_t{1} << 31, 1, 0, 1, 1, 1},
                        {1, 1, int64_t{1} << 62, int64_t{1} << 62, 0, 1, 1, 1}};
  const std::pair<XLA_FFI_DataType, int64_t> dtypes[] = {{XLA_FFI_DataType_PRED, 1},
                                                         {XLA_FFI_DataType_F8E4M3FN, 1},
                                                         {XLA_FFI_DataType_C64, 8},
                                                         {XLA_FFI_DataType_U32, 4}};
  for (const Target* const each : kTargets) {
    const Target& target = *each;
    const size_t map = &target == &kScatter ? 3 : 0;
    for (size_t i = 0; i < target.names.size(); ++i) {
      const Array is = make(target.names[i], right, kF32, kS32);
      const auto expect_error_with = [&](XLA_FFI_DataType type, int64_t item_size,
                                         std::vector<int64_t> dims, const std::string& name) {
        expect_error(target, right, kF32, kS32, name, i, Array(type, item_size, std::move(dims)));
      };
      std::vector<std::vector<int64_t>> other_rank(3, is.dims);
      other_rank[0].pop_back();
      other_rank[1].push_back(1);
      other_rank[2].clear();
      for (const auto& dims : other_rank) {
        expect_error_with(is.dtype, is.item_size, dims, target.names[i]);
      }
      for (size_t axis = 0; axis < is.dims.size(); ++axis) {
        if (i == map && 0 < axis && axis < 4) continue;  // a map may be of any size
        std::vector<int64_t> more = is.dims, less = is.dims;
        ++more[axis];
        --less[axis];
        expect_error_with(is.dtype, is.item_size, more, "");
        expect_error_with(is.dtype, is.item_size, less, "");
      }
      for (const auto& [type, item_size] : dtypes) {
        const bool is_map_of_integers = i == map && type == XLA_FFI_DataType_U32;
        expect_error_with(type, item_size, is.dims, is_map_of_integers ? "" : target.names[i]);
      }
    }
    for (const Sizes& s : huge) expect_error(target, s, kF32, kS32, target.names[map]);
    const size_t pooled = &target == &kScatter ? 0 : target.args;
    for (const int64_t bins : {int64_t{1} << 31, int64_t{1} << 60}) {
      for (const Sizes& s : {Sizes{1, 1, 1, 1, 0, 0, bins, 1}, Sizes{1, 1, 1, 1, 0, 0, 1, bins}}) {
        expect_error(target, s, kF32, kS32, target.names[pooled]);
      }
    }
    Array image_index_only(XLA_FFI_DataType_S32, 4, {right.G, right.K});
    const size_t edges = target.args - 1;
    expect_error(target, right, kF32, kS32, "edges", edges, std::move(image_index_only));
    if (&target != &kMax) {
      expect_error(target, {1, 1, 128, 257, 1, 1, 1, 1}, kF32, kS16, "argmax");
    }
    if (&target == &kScatter) {
      for (const Dtype& integer : kIntegers) {
        expect_error(target, right, integer, kS32, "cotangent");
      }
      for (const Dtype& narrow : {kBf16, kF16}) {
        Array features = make("features", right, narrow, kS32);
        expect_error(target, right, narrow, kS32, "gradient", map, std::move(features));
      }
    }
  }
}

// The environment variable is read once, by the first call.
void check_calls_without_vectors() {
  setenv("JAX_ROIPOOL_CPU_VECTORS", "sse9", 1);
  const std::string wanted =
      "the environment variable JAX_ROIPOOL_CPU_VECTORS must be unset or one of ";
  const Sizes sizes = {1, 1, 2, 2, 1, 1, 1, 1};
  Pool pool("none", 0, Start::kNever);
  for (const Target* const target : kTargets) {
    std::vector<Array> arrays;
    for (const char* name : target->names) arrays.push_back(make(name, sizes, kF32, kS32));
    const Outcome outcome = target->call(pool, arrays, false, true);
    if (outcome.code == XLA_FFI_Error_Code_INVALID_ARGUMENT &&
        outcome.message.rfind(std::string(target->name) + ": " + wanted, 0) == 0 &&
        outcome.message.find("baseline") != std::string::npos &&
        outcome.message.find("sse9") != std::string::npos) {
      continue;
    }
    fail(std::string(target->name) + ": vectors \"sse9\" give \"" + outcome.message + "\"");
  }
  if (std::string(jax_roipool_cpu_vectors()).rfind(wanted, 0) != 0) {
    fail(std::string("the vectors are \"") + jax_roipool_cpu_vectors() + "\"");
  }
}

void on_alarm(int) {
  constexpr char kMessage[] = "fuzz_handlers: a call does not return\n";
  const auto written = write(STDERR_FILENO, kMessage, sizeof kMessage - 1);
  _exit(written < 0 ? 2 : 1);
}

void run(uint64_t cases, uint64_t first) {
  std::signal(SIGALRM, on_alarm);
  check_wrong_calls();
  Pool none("none", 0, Start::kNever), one("of 1", 1, Start::kAtOnce);
  Pool two("of 2", 2, Start::kAtOnce), late("of 3, late", 3, Start::kLate);
  Pool never("of 5, never", 5, Start::kNever), refused("of 4, refused", 4, Start::kRefused);
  Pool eight("of 8", 8, Start::kAtOnce);
  for (uint64_t i = first; i < first + cases; ++i) {
    check_case(i, {&none, &one, &two, &late, &never, &refused, &eight});
    never.run_what_is_left();  // when the arrays of the calls are gone
  }
  check_concurrent_calls(first, cases);
}

}  // namespace
}  // namespace fuzz

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "--vectors") {
    std::puts(jax_roipool_cpu_vectors());
    return 0;
  }
  if (argc > 1 && std::string(argv[1]) == "--no-vectors") {
    fuzz::check_calls_without_vectors();
    return 0;
  }
  fuzz::run(argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 500,
            argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
  return 0;
}
