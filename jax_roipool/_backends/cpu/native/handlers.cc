// What XLA calls. Nothing that arrives is trusted: shapes and types are checked here, indices and
// edges where they are used.
#include <algorithm>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <limits>
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
  void has_rank(const char* name, ffi::AnyBuffer buffer, size_t rank) {
    if (buffer.dimensions().size() != rank) {
      expected(name, "an array with " + std::to_string(rank) + " axes", buffer);
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
        argmax.element_type() == ffi::S16 && map.cells() <= std::numeric_limits<int16_t>::max();
    is("argmax", argmax, narrow ? ffi::S16 : ffi::S32,
       {shape.groups, shape.rois, shape.bin_rows, shape.bin_cols, shape.channels});
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

const int32_t* int32s(ffi::AnyBuffer buffer) {
  return static_cast<const int32_t*>(buffer.untyped_data());
}

Threads threads_of(ffi::ThreadPool& pool) {
  return {pool.num_threads(),
          [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); }};
}

ffi::Error pool_rectangles(const char* target, ffi::ThreadPool& pool, ffi::AnyBuffer features,
                           ffi::AnyBuffer image_index, ffi::AnyBuffer row_start,
                           ffi::AnyBuffer row_end, ffi::AnyBuffer col_start, ffi::AnyBuffer col_end,
                           bool empty_is_lowest, ffi::AnyBuffer pooled,
                           std::optional<ffi::AnyBuffer> argmax) {
  Check check(target);
  check.is_map("features", features);
  check.has_rank("row_start", row_start, 3);
  check.has_rank("col_start", col_start, 3);
  if (!check.ok()) return check.error();

  const MapShape map = map_shape(features);
  const auto rows = row_start.dimensions(), cols = col_start.dimensions();
  const PooledShape shape = {map.groups, rows[1], rows[2], cols[2], map.channels};
  check.is("image_index", image_index, ffi::S32, {shape.groups, shape.rois});
  check.is("row_start", row_start, ffi::S32, {shape.groups, shape.rois, shape.bin_rows});
  check.is("row_end", row_end, ffi::S32, {shape.groups, shape.rois, shape.bin_rows});
  check.is("col_start", col_start, ffi::S32, {shape.groups, shape.rois, shape.bin_cols});
  check.is("col_end", col_end, ffi::S32, {shape.groups, shape.rois, shape.bin_cols});
  check.is("pooled", pooled, features.element_type(),
           {shape.groups, shape.rois, shape.bin_rows, shape.bin_cols, shape.channels});
  if (argmax) check.is_argmax(*argmax, map, shape);
  if (!check.ok()) return check.error();

  rectangle_max(
      loops_of(features.element_type(), argmax ? argmax->element_type() : ffi::S32), map, shape,
      features.untyped_data(),
      {int32s(image_index), int32s(row_start), int32s(row_end), int32s(col_start), int32s(col_end)},
      empty_is_lowest, pooled.untyped_data(), argmax ? argmax->untyped_data() : nullptr,
      threads_of(pool));
  return ffi::Error::Success();
}

ffi::Error max_handler(ffi::ThreadPool pool, ffi::AnyBuffer features, ffi::AnyBuffer image_index,
                       ffi::AnyBuffer row_start, ffi::AnyBuffer row_end, ffi::AnyBuffer col_start,
                       ffi::AnyBuffer col_end, bool empty_is_lowest, Result pooled) {
  return pool_rectangles("jax_roipool_cpu_max", pool, features, image_index, row_start, row_end,
                         col_start, col_end, empty_is_lowest, *pooled, std::nullopt);
}

ffi::Error argmax_handler(ffi::ThreadPool pool, ffi::AnyBuffer features, ffi::AnyBuffer image_index,
                          ffi::AnyBuffer row_start, ffi::AnyBuffer row_end,
                          ffi::AnyBuffer col_start, ffi::AnyBuffer col_end, bool empty_is_lowest,
                          Result pooled, Result argmax) {
  return pool_rectangles("jax_roipool_cpu_argmax", pool, features, image_index, row_start, row_end,
                         col_start, col_end, empty_is_lowest, *pooled, *argmax);
}

// What a gather and a scatter have in common: a map, and bins that each go with one of its cells.
void check_argmax(Check& check, const char* map_name, ffi::AnyBuffer map, const char* pooled_name,
                  ffi::AnyBuffer pooled, ffi::DataType pooled_type, ffi::AnyBuffer argmax,
                  ffi::AnyBuffer image_index) {
  check.is_map(map_name, map);
  check.has_rank(pooled_name, pooled, 5);
  if (!check.ok()) return;
  const MapShape m = map_shape(map);
  const PooledShape p = pooled_shape(pooled);
  check.is(pooled_name, pooled, pooled_type,
           {m.groups, p.rois, p.bin_rows, p.bin_cols, m.channels});
  check.is_argmax(argmax, m, p);
  check.is("image_index", image_index, ffi::S32, {m.groups, p.rois});
}

ffi::Error gather_handler(ffi::ThreadPool pool, ffi::AnyBuffer features, ffi::AnyBuffer argmax,
                          ffi::AnyBuffer image_index, Result tangent) {
  Check check("jax_roipool_cpu_gather");
  check_argmax(check, "features", features, "tangent", *tangent, features.element_type(), argmax,
               image_index);
  if (!check.ok()) return check.error();
  gather_at_argmax(loops_of(features.element_type(), argmax.element_type()), map_shape(features),
                   pooled_shape(*tangent), features.untyped_data(), argmax.untyped_data(),
                   int32s(image_index), tangent->untyped_data(), threads_of(pool));
  return ffi::Error::Success();
}

ffi::Error scatter_handler(ffi::ThreadPool pool, ffi::AnyBuffer cotangent, ffi::AnyBuffer argmax,
                           ffi::AnyBuffer image_index, Result gradient) {
  Check check("jax_roipool_cpu_scatter");
  const ffi::DataType type = cotangent.element_type();
  const bool is_float =
      type == ffi::F32 || type == ffi::F64 || type == ffi::BF16 || type == ffi::F16;
  if (!is_float) check.expected("cotangent", "of a floating dtype", cotangent);
  check_argmax(check, "gradient", *gradient, "cotangent", cotangent, type, argmax, image_index);
  const auto shape = gradient->dimensions();
  if (check.ok()) {
    check.is("gradient", *gradient, type == ffi::F64 ? ffi::F64 : ffi::F32,
             {shape[0], shape[1], shape[2], shape[3], shape[4]});
  }
  if (!check.ok()) return check.error();
  const ChannelLoops& loops = loops_of(type, argmax.element_type());
  scatter_at_argmax(loops, map_shape(*gradient), pooled_shape(cotangent), cotangent.untyped_data(),
                    argmax.untyped_data(), int32s(image_index), gradient->untyped_data(),
                    threads_of(pool));
  return ffi::Error::Success();
}

// Features, image_index, row_start, row_end, col_start, col_end.
auto bind_rectangles() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Attr<bool>("empty_is_lowest");
}

// Features or cotangent, argmax, image_index.
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

// The names are part of every program that was exported with them.
#define JAX_ROIPOOL_HANDLER(name, implementation, ...)         \
  extern "C" EXPORTED XLA_FFI_Error* name(XLA_FFI_CallFrame*); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, implementation, __VA_ARGS__)

JAX_ROIPOOL_HANDLER(jax_roipool_cpu_max, jax_roipool::max_handler,
                    jax_roipool::bind_rectangles().Ret<xla::ffi::AnyBuffer>());
JAX_ROIPOOL_HANDLER(
    jax_roipool_cpu_argmax, jax_roipool::argmax_handler,
    jax_roipool::bind_rectangles().Ret<xla::ffi::AnyBuffer>().Ret<xla::ffi::AnyBuffer>());
JAX_ROIPOOL_HANDLER(jax_roipool_cpu_gather, jax_roipool::gather_handler,
                    jax_roipool::bind_argmax());
JAX_ROIPOOL_HANDLER(jax_roipool_cpu_scatter, jax_roipool::scatter_handler,
                    jax_roipool::bind_argmax());

// The name of the vector instructions in use.
extern "C" EXPORTED const char* jax_roipool_cpu_vectors() { return jax_roipool::vectors().name; }
