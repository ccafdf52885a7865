// What XLA calls for weighted sums: see jax_roipool/_backends/weighted_sum for the operands.
#include "calls.h"
#include "weighted_sum.h"

namespace jax_roipool {
namespace {

struct Operands {
  ffi::AnyBuffer cells, rows, columns;
  int64_t row_runs, column_runs;  // of a bin
};

const SumLoops& loops_of(ffi::DataType element) {
  return (*vectors().sums)[static_cast<int>(*element_of(element))];
}

void check_weights(Check& check, const char* name, ffi::AnyBuffer weights, int64_t runs,
                   const PooledShape& shape, int64_t bins) {
  const auto dimensions = weights.dimensions();
  const int64_t taps = dimensions.size() == 4 ? dimensions[3] : 0;
  check.is(name, weights, ffi::F32, {shape.num_groups, shape.num_rois, bins, taps});
  const bool are_whole = runs > 0 ? taps % runs == 0 : runs == 0 && taps == 0;
  if (!are_whole || taps > std::numeric_limits<int32_t>::max()) {
    check.expected(name, "of " + std::to_string(runs) + " runs of as many taps each", weights);
  }
}

void check_shapes(Check& check, const char* map_name, ffi::AnyBuffer map, const char* pooled_name,
                  ffi::AnyBuffer pooled, ffi::DataType pooled_type, const Operands& operands) {
  check.is_map(map_name, map);
  check.is_pooled(pooled_name, pooled);
  if (!check.ok()) return;
  const MapShape m = map_shape(map);
  const PooledShape p = pooled_shape(pooled);
  if (!is_float(map.element_type())) check.expected(map_name, "of a floating dtype", map);
  check.is(pooled_name, pooled, pooled_type,
           {m.num_groups, p.num_rois, p.bin_rows, p.bin_cols, m.channels});
  check_weights(check, "rows", operands.rows, operands.row_runs, p, p.bin_rows);
  check_weights(check, "columns", operands.columns, operands.column_runs, p, p.bin_cols);
  if (!check.ok()) return;
  const int64_t lanes = 3 + p.bin_rows * operands.row_runs + p.bin_cols * operands.column_runs;
  check.is("cells", operands.cells, ffi::S32, {m.num_groups, p.num_rois, lanes});
}

BinTaps bins_of(const Operands& operands, const MapShape& map, const PooledShape& shape) {
  const auto axis = [](ffi::AnyBuffer weights, int64_t runs, int64_t first, int64_t count,
                       int64_t size, int64_t stride) -> AxisTaps {
    const auto dimensions = weights.dimensions();
    return {static_cast<const float*>(weights.untyped_data()),
            dimensions[2],
            dimensions[3],
            runs,
            first,
            count,
            size,
            stride};
  };
  const int64_t first_column = 3 + shape.bin_rows * operands.row_runs;
  return {static_cast<const int32_t*>(operands.cells.untyped_data()),
          operands.cells.dimensions()[2], map,
          axis(operands.rows, operands.row_runs, 3, 1, map.height, map.width * map.channels),
          axis(operands.columns, operands.column_runs, first_column, 2, map.width, map.channels)};
}

ffi::Error sum(const char* target, ffi::ThreadPool& pool, ffi::AnyBuffer features,
               const Operands& operands, std::optional<ffi::AnyBuffer> onto,
               ffi::AnyBuffer pooled) {
  return run(target, [&]() -> ffi::Error {
    Check check(target);
    const ffi::DataType type = features.element_type();
    check_shapes(check, "features", features, onto ? "joined" : "pooled", pooled, type, operands);
    if (onto) check.is("onto", *onto, type, pooled.dimensions());
    if (!check.ok()) return check.error();
    const MapShape map = map_shape(features);
    const PooledShape shape = pooled_shape(pooled);
    weighted_sum(loops_of(type), map, shape, features.untyped_data(), bins_of(operands, map, shape),
                 onto ? onto->untyped_data() : nullptr, pooled.untyped_data(), threads_of(pool));
    return ffi::Error::Success();
  });
}

ffi::Error sum_handler(ffi::ThreadPool pool, ffi::AnyBuffer features, ffi::AnyBuffer cells,
                       ffi::AnyBuffer rows, ffi::AnyBuffer columns, int64_t row_runs,
                       int64_t column_runs, Result pooled) {
  return sum("jax_roipool_cpu_weighted_sum_v1", pool, features,
             {cells, rows, columns, row_runs, column_runs}, std::nullopt, *pooled);
}

ffi::Error sum_onto_handler(ffi::ThreadPool pool, ffi::AnyBuffer features, ffi::AnyBuffer cells,
                            ffi::AnyBuffer rows, ffi::AnyBuffer columns, ffi::AnyBuffer onto,
                            int64_t row_runs, int64_t column_runs, Result pooled) {
  return sum("jax_roipool_cpu_weighted_sum_onto_v1", pool, features,
             {cells, rows, columns, row_runs, column_runs}, onto, *pooled);
}

ffi::Error scatter_handler(ffi::ThreadPool pool, ffi::AnyBuffer cotangent, ffi::AnyBuffer cells,
                           ffi::AnyBuffer rows, ffi::AnyBuffer columns, int64_t row_runs,
                           int64_t column_runs, Result gradient) {
  constexpr char kTarget[] = "jax_roipool_cpu_weighted_scatter_v1";
  const Operands operands = {cells, rows, columns, row_runs, column_runs};
  return run(kTarget, [&]() -> ffi::Error {
    Check check(kTarget);
    const ffi::DataType type = cotangent.element_type();
    if (!is_float(type)) check.expected("cotangent", "of a floating dtype", cotangent);
    check_shapes(check, "gradient", *gradient, "cotangent", cotangent, type, operands);
    check.are_sums("gradient", *gradient, type);
    if (!check.ok()) return check.error();
    const MapShape map = map_shape(*gradient);
    const PooledShape shape = pooled_shape(cotangent);
    weighted_scatter(loops_of(type), map, shape, cotangent.untyped_data(),
                     bins_of(operands, map, shape), gradient->untyped_data(), threads_of(pool));
    return ffi::Error::Success();
  });
}

// Features or cotangent, cells, rows, columns.
auto bind_operands() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>();
}

// How many runs the taps of a bin have, and the result.
template <class Operands>
auto bind_rest(Operands operands) {
  return std::move(operands)
      .template Attr<int64_t>("row_runs")
      .template Attr<int64_t>("column_runs")
      .template Ret<ffi::AnyBuffer>();
}

}  // namespace
}  // namespace jax_roipool

JAX_ROIPOOL_HANDLER(jax_roipool_cpu_weighted_sum_v1, jax_roipool::sum_handler,
                    jax_roipool::bind_rest(jax_roipool::bind_operands()));
JAX_ROIPOOL_HANDLER(
    jax_roipool_cpu_weighted_sum_onto_v1, jax_roipool::sum_onto_handler,
    jax_roipool::bind_rest(jax_roipool::bind_operands().Arg<xla::ffi::AnyBuffer>()));
JAX_ROIPOOL_HANDLER(jax_roipool_cpu_weighted_scatter_v1, jax_roipool::scatter_handler,
                    jax_roipool::bind_rest(jax_roipool::bind_operands()));
