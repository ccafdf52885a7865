"""A portable backend: bin masks, `jax.ops.segment_max`, and indexing at the argmax.

Features are compared as integers of the same order (`ordered.py`). The maximum over a rectangle is
separable: first over columns, keeping the smallest column, then over rows, keeping the smallest
row, which is the first maximum in row-major order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_roipool._backends.rectangle_max import indexing
from jax_roipool._backends.rectangle_max.portable import image_of, pool_in_chunks

CHUNK_BYTES = 1 << 22
"""RoIs are pooled so many at a time that a copy of their feature maps takes about this much.

Measured on two CPU cores: a larger chunk leaves the cache and is three times slower.
"""

gather_at_argmax = indexing.gather_at_argmax
scatter_at_argmax = indexing.scatter_at_argmax


def rectangle_max(features, edges, *, output_size, argmax_dtype, empty_value):
    """See `jax_roipool._backends.rectangle_max`."""
    bytes_per_roi = features[:, :1].nbytes
    return pool_in_chunks(
        _pool_roi,
        features,
        edges,
        max(1, CHUNK_BYTES // max(1, bytes_per_roi)),
        output_size=output_size,
        argmax_dtype=argmax_dtype,
        empty_value=empty_value,
    )


def _pool_roi(keys, image_index, row_start, row_end, col_start, col_end):
    """The maxima of one RoI in `keys` `[n, W, H, C]`, and the argmaxes: `[P, Q, C]`."""
    width = keys.shape[1]
    image = image_of(keys, image_index)
    over_cols, cols = _max_over_bins(image, col_start, col_end)  # [Q, H, C]
    over_rows, rows = _max_over_bins(jnp.swapaxes(over_cols, 0, 1), row_start, row_end)
    cols = jnp.take_along_axis(jnp.swapaxes(cols, 0, 1), rows, axis=0, mode="clip")
    return over_rows, rows * width + cols


def _max_over_bins(keys, start, end):
    """Maximum of keys `[cells, ...]` over bins, `[bins, ...]`, and the first index that has it.

    A bin is its core, the cells before the next bin's start, and its last cell, which can be in
    the next bin's core as well. The cores are disjoint, so one segment-max pools them all.
    """
    size, bins = keys.shape[0], start.shape[0]
    cell = jnp.arange(size, dtype=jnp.int32)
    started = start[None, :] <= cell[:, None]  # mask [size, bins]
    inside = (start[0] <= cell) & (cell < end.max())
    core = jnp.where(inside, started.sum(axis=1, dtype=jnp.int32) - 1, bins)
    last = jnp.clip(end - 1, 0, size - 1)

    core_max = jax.ops.segment_max(keys, core, bins + 1)
    last_key = keys[last]
    maximum = jnp.maximum(core_max[:bins], last_key)

    cell, last = (index.reshape(-1, *[1] * (keys.ndim - 1)) for index in (cell, last))
    is_core_max = keys == core_max[core]
    first_in_core = jax.ops.segment_min(jnp.where(is_core_max, cell, size), core, bins + 1)[:bins]
    first = jnp.minimum(
        jnp.where(core_max[:bins] == maximum, first_in_core, size),
        jnp.where(last_key == maximum, last, size),
    )
    return maximum, first
