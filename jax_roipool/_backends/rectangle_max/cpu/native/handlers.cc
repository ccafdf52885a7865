// What XLA calls. Nothing that arrives is trusted: shapes and types are checked here, edges and
// argmaxes where they are used.
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

#include "pooling.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

#if defined(_WIN32)
#define EXPORTED __declspec(dllexport)
#else
#define EXPORTED __attribute__((visibility("default")))
#endif

namespace jax_roipool {
namespace {

namespace ffi = xla::ffi;

using Result = ffi::Result<ffi::AnyBuffer>;

std::optional<Element> element_of(ffi::DataType type) {
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

const ChannelLoops& loops_of(ffi::DataType element, ffi::DataType argmax) {
  const Argmax size = argmax == ffi::S16 ? Argmax::kInt16 : Argmax::kInt32;
  const Tables& tables = *vectors().tables;
  return tables[static_cast<int>(*element_of(element))][static_cast<int>(size)];
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
  void is(const char* name, ffi::AnyBuffer buffer, ffi::DataType type,
          std::initializer_list<int64_t> shape) {
    const auto got = buffer.dimensions();
    if (buffer.element_type() != type ||
        !std::equal(got.begin(), got.end(), shape.begin(), shape.end())) {
      expected(name, describe(type, shape), buffer);
    }
  }
  void is_argmax(ffi::AnyBuffer argmax, const MapShape& map, const PooledShape& shape) {
    const bool narrow =
        argmax.element_type() == ffi::S16 && map.cells() - 1 <= std::numeric_limits<int16_t>::max();
    is("argmax", argmax, narrow ? ffi::S16 : ffi::S32,
       {shape.num_groups, shape.num_rois, shape.bin_rows, shape.bin_cols, shape.channels});
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

MapShape map_shape(ffi::AnyBuffer map) {
  const auto d = map.dimensions();
  return {d[0], d[1], d[2], d[3], d[4]};
}

PooledShape pooled_shape(ffi::AnyBuffer pooled) {
  const auto d = pooled.dimensions();
  return {d[0], d[1], d[2], d[3], d[4]};
}

Rectangles rectangles_of(ffi::AnyBuffer edges, const MapShape& map, const PooledShape& shape) {
  return {static_cast<const int32_t*>(edges.untyped_data()), map, shape};
}

Threads threads_of(ffi::ThreadPool& pool) {
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

// What all handlers have in common: a map [groups, images, rows, columns, channels], what is pooled
// from it or goes back to it [groups, RoIs, rows of bins, columns of bins, channels], the argmaxes
// of the same shape, if there are any, and the edges of the bins.
void check_shapes(Check& check, const char* map_name, ffi::AnyBuffer map, const char* pooled_name,
                  ffi::AnyBuffer pooled, ffi::DataType pooled_type,
                  std::optional<ffi::AnyBuffer> argmax, ffi::AnyBuffer edges) {
  check.is_map(map_name, map);
  check.is_pooled(pooled_name, pooled);
  if (!check.ok()) return;
  const MapShape m = map_shape(map);
  const PooledShape p = pooled_shape(pooled);
  check.is(pooled_name, pooled, pooled_type,
           {m.num_groups, p.num_rois, p.bin_rows, p.bin_cols, m.channels});
  if (argmax) check.is_argmax(*argmax, m, p);
  check.is("edges", edges, ffi::S32, {m.num_groups, p.num_rois, p.lanes()});
}

ffi::Error pool_rectangles(const char* target, ffi::ThreadPool& pool, ffi::AnyBuffer features,
                           ffi::AnyBuffer edges, bool empty_is_lowest, ffi::AnyBuffer pooled,
                           std::optional<ffi::AnyBuffer> argmax) {
  return run(target, [&]() -> ffi::Error {
    Check check(target);
    const ffi::DataType type = features.element_type();
    check_shapes(check, "features", features, "pooled", pooled, type, argmax, edges);
    if (!check.ok()) return check.error();
    const MapShape map = map_shape(features);
    const PooledShape shape = pooled_shape(pooled);
    rectangle_max(loops_of(type, argmax ? argmax->element_type() : ffi::S32), map, shape,
                  features.untyped_data(), rectangles_of(edges, map, shape), empty_is_lowest,
                  pooled.untyped_data(), argmax ? argmax->untyped_data() : nullptr,
                  threads_of(pool));
    return ffi::Error::Success();
  });
}

ffi::Error max_handler(ffi::ThreadPool pool, ffi::AnyBuffer features, ffi::AnyBuffer edges,
                       bool empty_is_lowest, Result pooled) {
  return pool_rectangles("jax_roipool_cpu_max_v2", pool, features, edges, empty_is_lowest, *pooled,
                         std::nullopt);
}

ffi::Error argmax_handler(ffi::ThreadPool pool, ffi::AnyBuffer features, ffi::AnyBuffer edges,
                          bool empty_is_lowest, Result pooled, Result argmax) {
  return pool_rectangles("jax_roipool_cpu_argmax_v2", pool, features, edges, empty_is_lowest,
                         *pooled, *argmax);
}

ffi::Error gather_handler(ffi::ThreadPool pool, ffi::AnyBuffer features, ffi::AnyBuffer argmax,
                          ffi::AnyBuffer edges, Result tangent) {
  constexpr char kTarget[] = "jax_roipool_cpu_gather_v2";
  return run(kTarget, [&]() -> ffi::Error {
    Check check(kTarget);
    const ffi::DataType type = features.element_type();
    check_shapes(check, "features", features, "tangent", *tangent, type, argmax, edges);
    if (!check.ok()) return check.error();
    const MapShape map = map_shape(features);
    const PooledShape shape = pooled_shape(*tangent);
    gather_at_argmax(loops_of(type, argmax.element_type()), map, shape, features.untyped_data(),
                     argmax.untyped_data(), rectangles_of(edges, map, shape),
                     tangent->untyped_data(), threads_of(pool));
    return ffi::Error::Success();
  });
}

ffi::Error scatter_handler(ffi::ThreadPool pool, ffi::AnyBuffer cotangent, ffi::AnyBuffer argmax,
                           ffi::AnyBuffer edges, Result gradient) {
  constexpr char kTarget[] = "jax_roipool_cpu_scatter_v2";
  return run(kTarget, [&]() -> ffi::Error {
    Check check(kTarget);
    const ffi::DataType type = cotangent.element_type();
    const bool is_float =
        type == ffi::F32 || type == ffi::F64 || type == ffi::BF16 || type == ffi::F16;
    if (!is_float) check.expected("cotangent", "of a floating dtype", cotangent);
    check_shapes(check, "gradient", *gradient, "cotangent", cotangent, type, argmax, edges);
    if (!check.ok()) return check.error();
    const MapShape map = map_shape(*gradient);
    const PooledShape shape = pooled_shape(cotangent);
    check.is("gradient", *gradient, type == ffi::F64 ? ffi::F64 : ffi::F32,
             {map.num_groups, map.num_images, map.height, map.width, map.channels});
    if (!check.ok()) return check.error();
    scatter_at_argmax(loops_of(type, argmax.element_type()), map, shape, cotangent.untyped_data(),
                      argmax.untyped_data(), rectangles_of(edges, map, shape),
                      gradient->untyped_data(), threads_of(pool));
    return ffi::Error::Success();
  });
}

// Features, edges.
auto bind_rectangles() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Attr<bool>("empty_is_lowest");
}

// Features or cotangent, argmax, edges.
auto bind_argmax() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>();
}

}  // namespace
}  // namespace jax_roipool

// The names are part of every program that was exported with them. The number rises when operands
// change, so that no old program gets a handler that takes other operands.
#define JAX_ROIPOOL_HANDLER(name, implementation, ...)         \
  extern "C" EXPORTED XLA_FFI_Error* name(XLA_FFI_CallFrame*); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, implementation, __VA_ARGS__)

JAX_ROIPOOL_HANDLER(jax_roipool_cpu_max_v2, jax_roipool::max_handler,
                    jax_roipool::bind_rectangles().Ret<xla::ffi::AnyBuffer>());
JAX_ROIPOOL_HANDLER(
    jax_roipool_cpu_argmax_v2, jax_roipool::argmax_handler,
    jax_roipool::bind_rectangles().Ret<xla::ffi::AnyBuffer>().Ret<xla::ffi::AnyBuffer>());
JAX_ROIPOOL_HANDLER(jax_roipool_cpu_gather_v2, jax_roipool::gather_handler,
                    jax_roipool::bind_argmax());
JAX_ROIPOOL_HANDLER(jax_roipool_cpu_scatter_v2, jax_roipool::scatter_handler,
                    jax_roipool::bind_argmax());

// The name of the vector instructions in use, or why there are none.
extern "C" EXPORTED const char* jax_roipool_cpu_vectors() {
  const jax_roipool::Vectors& vectors = jax_roipool::vectors();
  return vectors.problem.empty() ? vectors.name : vectors.problem.c_str();
}
