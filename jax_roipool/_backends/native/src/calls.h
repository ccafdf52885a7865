// What the handlers have in common. Nothing that arrives is trusted: shapes and types are checked
// here, and what is in arrays of integers where it is used.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <functional>
#include <initializer_list>
#include <limits>
#include <new>
#include <optional>
#include <sstream>
#include <string>
#include <utility>

#include "loops.h"
#include "parallel.h"
#include "shapes.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace jax_roipool {

namespace ffi = xla::ffi;

using Result = ffi::Result<ffi::AnyBuffer>;

inline std::optional<Element> element_of(ffi::DataType type) {
  switch (type) {
    case ffi::F32: return Element::kFloat32;
    case ffi::F64: return Element::kFloat64;
    case ffi::BF16: return Element::kBfloat16;
    case ffi::F16: return Element::kFloat16;
    case ffi::S8: return Element::kInt8;
    case ffi::S16: return Element::kInt16;
    case ffi::S32: return Element::kInt32;
    case ffi::S64: return Element::kInt64;
    case ffi::U8: return Element::kUint8;
    case ffi::U16: return Element::kUint16;
    case ffi::U32: return Element::kUint32;
    case ffi::U64: return Element::kUint64;
    default: return std::nullopt;
  }
}

inline bool is_float(ffi::DataType type) {
  const auto element = element_of(type);
  return element && static_cast<int>(*element) < kFloats;
}

template <class Sizes>
std::string describe(ffi::DataType type, const Sizes& shape) {
  std::ostringstream text;
  text << type << "[";
  const char* separator = "";
  for (const int64_t size : shape) {
    text << separator << size;
    separator = ", ";
  }
  text << "]";
  return text.str();
}

// Finds the first thing that is wrong with a call.
class Check {
 public:
  explicit Check(const char* target) : target_(target) {}

  void is_map(const char* name, ffi::AnyBuffer map) {
    const auto shape = map.dimensions();
    if (shape.size() != 5) return expected(name, "[groups, images, rows, columns, channels]", map);
    if (shape[3] > 0 && shape[2] > std::numeric_limits<int32_t>::max() / shape[3]) {
      return expected(name, "a map of less than 2**31 cells", map);
    }
    if (!element_of(map.element_type())) {
      return expected(name, "of a floating or integer dtype", map);
    }
  }
  // Larger numbers of bins, which only arrays without elements have, would overflow below.
  void is_pooled(const char* name, ffi::AnyBuffer pooled) {
    const auto shape = pooled.dimensions();
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    if (shape.size() != 5 || shape[2] > kMost || shape[3] > kMost) {
      expected(name, "[groups, RoIs, rows of bins, columns of bins, channels]", pooled);
    }
  }
  template <class Sizes = std::initializer_list<int64_t>>
  void is(const char* name, ffi::AnyBuffer buffer, ffi::DataType type, const Sizes& shape) {
    const auto got = buffer.dimensions();
    if (buffer.element_type() != type ||
        !std::equal(got.begin(), got.end(), shape.begin(), shape.end())) {
      expected(name, describe(type, shape), buffer);
    }
  }
  // Of elements of this type, which are in float32 at least.
  void are_sums(const char* name, ffi::AnyBuffer sums, ffi::DataType element) {
    const ffi::DataType type = element == ffi::F64 ? ffi::F64 : ffi::F32;
    if (sums.element_type() != type) expected(name, describe(type, sums.dimensions()), sums);
  }
  void expected(const char* name, const std::string& what, ffi::AnyBuffer got) {
    if (problem_) return;
    problem_ = std::string(target_) + ": " + name + " must be " + what + ", got " +
               describe(got.element_type(), got.dimensions());
  }

  bool ok() const { return !problem_; }
  ffi::Error error() const { return {ffi::ErrorCode::kInvalidArgument, *problem_}; }

 private:
  const char* target_;
  std::optional<std::string> problem_;
};

inline MapShape map_shape(ffi::AnyBuffer map) {
  const auto d = map.dimensions();
  return {d[0], d[1], d[2], d[3], d[4]};
}

inline PooledShape pooled_shape(ffi::AnyBuffer pooled) {
  const auto d = pooled.dimensions();
  return {d[0], d[1], d[2], d[3], d[4]};
}

inline Threads threads_of(ffi::ThreadPool& pool) {
  return {pool.num_threads(),
          [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); }};
}

// Calls `work`, unless there are no vectors to work with. No exception may reach XLA.
template <class Work>
ffi::Error run(const char* target, Work work) {
  const auto message = [&](const std::string& what) { return target + (": " + what); };
  try {
    const std::string& problem = vectors().problem;
    if (!problem.empty()) return {ffi::ErrorCode::kInvalidArgument, message(problem)};
    return work();
  } catch (const std::bad_alloc&) {
    return {ffi::ErrorCode::kResourceExhausted,
            message("out of memory; pool fewer images or fewer RoIs at a time")};
  } catch (const std::exception& error) {
    return {ffi::ErrorCode::kInternal, message(error.what())};
  }
}

}  // namespace jax_roipool

// The names are part of every program that was exported with them. The number rises when operands
// change, so that no old program gets a handler that takes other operands.
#define JAX_ROIPOOL_HANDLER(name, implementation, ...)         \
  extern "C" EXPORTED XLA_FFI_Error* name(XLA_FFI_CallFrame*); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, implementation, __VA_ARGS__)
