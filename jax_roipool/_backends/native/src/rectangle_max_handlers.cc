// What XLA calls for maxima.
#include "calls.h"
#include "rectangle_max.h"

namespace jax_roipool {
namespace {

const MaximumLoops& loops_of(ffi::DataType element, ffi::DataType argmax) {
  const Argmax size = argmax == ffi::S16 ? Argmax::kInt16 : Argmax::kInt32;
  const MaximumTables& tables = *vectors().maxima;
  return tables[static_cast<int>(*element_of(element))][static_cast<int>(size)];
}

Rectangles rectangles_of(ffi::AnyBuffer edges, const MapShape& map, const PooledShape& shape) {
  return {static_cast<const int32_t*>(edges.untyped_data()), map, shape};
}

void check_argmax(Check& check, ffi::AnyBuffer argmax, const MapShape& map,
                  const PooledShape& shape) {
  const bool narrow =
      argmax.element_type() == ffi::S16 && map.cells() - 1 <= std::numeric_limits<int16_t>::max();
  check.is("argmax", argmax, narrow ? ffi::S16 : ffi::S32,
           {shape.num_groups, shape.num_rois, shape.bin_rows, shape.bin_cols, shape.channels});
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
  if (argmax) check_argmax(check, *argmax, m, p);
  check.is("edges", edges, ffi::S32, {m.num_groups, p.num_rois, p.lanes()});
}

ffi::Error pool_rectangles(const char* target, ffi::ThreadPool& pool, ffi::AnyBuffer features,
                           ffi::AnyBuffer edges, std::optional<ffi::AnyBuffer> onto,
                           bool empty_is_lowest, ffi::AnyBuffer pooled,
                           std::optional<ffi::AnyBuffer> argmax) {
  return run(target, [&]() -> ffi::Error {
    Check check(target);
    const ffi::DataType type = features.element_type();
    check_shapes(check, "features", features, onto ? "joined" : "pooled", pooled, type, argmax,
                 edges);
    if (onto) check.is("onto", *onto, type, pooled.dimensions());
    if (!check.ok()) return check.error();
    const MapShape map = map_shape(features);
    const PooledShape shape = pooled_shape(pooled);
    rectangle_max(loops_of(type, argmax ? argmax->element_type() : ffi::S32), map, shape,
                  features.untyped_data(), rectangles_of(edges, map, shape), empty_is_lowest,
                  onto ? onto->untyped_data() : nullptr, pooled.untyped_data(),
                  argmax ? argmax->untyped_data() : nullptr, threads_of(pool));
    return ffi::Error::Success();
  });
}

ffi::Error max_handler(ffi::ThreadPool pool, ffi::AnyBuffer features, ffi::AnyBuffer edges,
                       bool empty_is_lowest, Result pooled) {
  return pool_rectangles("jax_roipool_cpu_max_v2", pool, features, edges, std::nullopt,
                         empty_is_lowest, *pooled, std::nullopt);
}

ffi::Error max_onto_handler(ffi::ThreadPool pool, ffi::AnyBuffer features, ffi::AnyBuffer edges,
                            ffi::AnyBuffer onto, bool empty_is_lowest, Result pooled) {
  return pool_rectangles("jax_roipool_cpu_max_onto_v1", pool, features, edges, onto,
                         empty_is_lowest, *pooled, std::nullopt);
}

ffi::Error argmax_handler(ffi::ThreadPool pool, ffi::AnyBuffer features, ffi::AnyBuffer edges,
                          bool empty_is_lowest, Result pooled, Result argmax) {
  return pool_rectangles("jax_roipool_cpu_argmax_v2", pool, features, edges, std::nullopt,
                         empty_is_lowest, *pooled, *argmax);
}

ffi::Error argmax_onto_handler(ffi::ThreadPool pool, ffi::AnyBuffer features, ffi::AnyBuffer edges,
                               ffi::AnyBuffer onto, bool empty_is_lowest, Result pooled,
                               Result argmax) {
  return pool_rectangles("jax_roipool_cpu_argmax_onto_v1", pool, features, edges, onto,
                         empty_is_lowest, *pooled, *argmax);
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
    if (!is_float(type)) check.expected("cotangent", "of a floating dtype", cotangent);
    check_shapes(check, "gradient", *gradient, "cotangent", cotangent, type, argmax, edges);
    check.are_sums("gradient", *gradient, type);
    if (!check.ok()) return check.error();
    const MapShape map = map_shape(*gradient);
    const PooledShape shape = pooled_shape(cotangent);
    scatter_at_argmax(loops_of(type, argmax.element_type()), map, shape, cotangent.untyped_data(),
                      argmax.untyped_data(), rectangles_of(edges, map, shape),
                      gradient->untyped_data(), threads_of(pool));
    return ffi::Error::Success();
  });
}

// Features, edges.
auto bind_rectangles() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>();
}

// Whether empty bins are the lowest value, and what is pooled.
template <class Operands>
auto bind_pooled(Operands operands) {
  return std::move(operands).template Attr<bool>("empty_is_lowest").template Ret<ffi::AnyBuffer>();
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

JAX_ROIPOOL_HANDLER(jax_roipool_cpu_max_v2, jax_roipool::max_handler,
                    jax_roipool::bind_pooled(jax_roipool::bind_rectangles()));
JAX_ROIPOOL_HANDLER(
    jax_roipool_cpu_max_onto_v1, jax_roipool::max_onto_handler,
    jax_roipool::bind_pooled(jax_roipool::bind_rectangles().Arg<xla::ffi::AnyBuffer>()));
JAX_ROIPOOL_HANDLER(
    jax_roipool_cpu_argmax_v2, jax_roipool::argmax_handler,
    jax_roipool::bind_pooled(jax_roipool::bind_rectangles()).Ret<xla::ffi::AnyBuffer>());
JAX_ROIPOOL_HANDLER(
    jax_roipool_cpu_argmax_onto_v1, jax_roipool::argmax_onto_handler,
    jax_roipool::bind_pooled(jax_roipool::bind_rectangles().Arg<xla::ffi::AnyBuffer>())
        .Ret<xla::ffi::AnyBuffer>());
JAX_ROIPOOL_HANDLER(jax_roipool_cpu_gather_v2, jax_roipool::gather_handler,
                    jax_roipool::bind_argmax());
JAX_ROIPOOL_HANDLER(jax_roipool_cpu_scatter_v2, jax_roipool::scatter_handler,
                    jax_roipool::bind_argmax());
