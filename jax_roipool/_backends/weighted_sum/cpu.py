"""The CPU backend: handlers of the native library."""

from __future__ import annotations

import jax
import numpy as np

from jax_roipool._backends.sums import sum_dtype
from jax_roipool._backends.weighted_sum.gather import column_weights, row_weights

__all__ = ["column_weights", "row_weights", "weighted_scatter", "weighted_sum"]


def weighted_sum(features, cells, rows, columns, onto=None, *, run):
    """See `jax_roipool._backends.weighted_sum`."""
    shape = (*rows.shape[:3], columns.shape[2], features.shape[4])
    result = jax.ShapeDtypeStruct(shape, features.dtype)
    operands = (features, cells, rows, columns)
    if onto is None:
        call = jax.ffi.ffi_call("jax_roipool_cpu_weighted_sum_v1", result)
    else:
        name = "jax_roipool_cpu_weighted_sum_onto_v1"
        call = jax.ffi.ffi_call(name, result, input_output_aliases={len(operands): 0})
        operands = (*operands, onto)
    return [call(*operands, **_attributes(rows, columns, run))]


def weighted_scatter(pooled, cells, rows, columns, *, run, map_shape):
    """See `jax_roipool._backends.weighted_sum`."""
    shape = (pooled.shape[0], *map_shape, pooled.shape[4])
    result = jax.ShapeDtypeStruct(shape, sum_dtype(pooled))
    call = jax.ffi.ffi_call("jax_roipool_cpu_weighted_scatter_v1", result)
    return [
        call(pooled, cells, rows, columns, **_attributes(rows, columns, run)).astype(pooled.dtype)
    ]


def _attributes(rows, columns, run):
    """How many runs a bin has along each axis, which is known even where their length is not."""
    return {
        "row_runs": np.int64(rows.shape[3] // run[0]),
        "column_runs": np.int64(columns.shape[3] // run[1]),
    }
