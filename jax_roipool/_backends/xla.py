"""A portable backend: bin masks, `jax.ops.segment_max`, and indexing at the argmax.

Features are compared as integers of the same order (`keys.py`). The maximum over a rectangle is
separable: first over columns, keeping the smallest column, then over rows, keeping the smallest
row, which is the first maximum in row-major order.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from jax_roipool._backends.portable import INDEX_LIMIT, image_of, pool_in_chunks

CHUNK_BYTES = 1 << 22
"""RoIs are pooled so many at a time that a copy of their feature maps takes about this much.

Measured on two CPU cores: a larger chunk leaves the cache and is three times slower.
"""


def rectangle_max(features, *rectangles, argmax_dtype, empty_value):
    """See `jax_roipool._rectangle_max`: maxima, and argmaxes if asked for, `[G, K, P, Q, C]`."""
    bytes_per_roi = features[:, :1].nbytes
    return pool_in_chunks(
        _pool_roi,
        features,
        rectangles,
        max(1, CHUNK_BYTES // max(1, bytes_per_roi)),
        argmax_dtype=argmax_dtype,
        empty_value=empty_value,
    )


def gather_at_argmax(features, argmax, image_index, *edges):
    """The features at each argmax, 0 where it is -1: `[G, K, P, Q, C]`."""
    if 0 in features.shape:
        return jnp.zeros(argmax.shape, features.dtype)
    images = features.shape[1]

    def gather_group(features, argmax, image_index):
        cells = features.reshape(images, -1, features.shape[-1])
        image = jnp.clip(image_index, 0, images - 1)[:, None, None, None]
        cell = jnp.maximum(argmax, 0).astype(jnp.int32)
        return cells[image, cell, _channel_of(argmax)]

    return jnp.where(argmax < 0, 0, jax.vmap(gather_group)(features, argmax, image_index))


def scatter_at_argmax(cotangent, argmax, image_index, *edges, map_shape):
    """Each cotangent added at its argmax, none where it is -1: `[G, n, H, W, C]`.

    On a GPU XLA adds in no fixed order, unless `--xla_gpu_deterministic_ops` is among its flags.
    """
    groups, *_, channels = cotangent.shape
    shape = (groups, *map_shape, channels)
    if 0 in shape or cotangent.size == 0:
        return jnp.zeros(shape, cotangent.dtype)
    images, height, width = map_shape
    cells = (images, height * width, channels)
    sum_dtype = cotangent.dtype if cotangent.dtype.itemsize > 4 else jnp.float32

    def scatter_group(cotangent, argmax, image_index):
        image = jnp.where(argmax < 0, images, image_index[:, None, None, None])
        cell = jnp.maximum(argmax, 0).astype(jnp.int32)
        index = (image, cell, _channel_of(argmax))
        sums = jnp.zeros(cells, sum_dtype)
        if math.prod(cells) + math.prod(cells[1:]) < INDEX_LIMIT:
            # One index instead of three: on a CPU faster, and with little over half the memory.
            index = (index[0] * math.prod(cells[1:]) + index[1] * channels + index[2],)
            sums = sums.reshape(-1)
        return sums.at[index].add(cotangent.astype(sum_dtype), mode="drop")

    sums = jax.vmap(scatter_group)(cotangent, argmax, image_index)
    return sums.reshape(shape).astype(cotangent.dtype)


def _channel_of(argmax):
    return lax.broadcasted_iota(jnp.int32, argmax.shape, argmax.ndim - 1)


def _pool_roi(keys, image_index, row_start, row_end, col_start, col_end):
    width = keys.shape[1]
    image = image_of(keys, image_index)
    over_cols, cols = _max_over_bins(image, col_start, col_end)
    over_rows, rows = _max_over_bins(jnp.swapaxes(over_cols, 0, 1), row_start, row_end)
    cols = jnp.take_along_axis(jnp.swapaxes(cols, 0, 1), rows, axis=0, mode="clip")
    return over_rows, rows * width + cols


def _max_over_bins(keys, start, end):
    """Maximum of `keys` over the bins of its first axis, and the first index that has it.

    A bin is its core, the cells before the next bin's start, and its last cell, which can be in
    the next bin's core as well. The cores are disjoint, so one segment-max pools them all.
    """
    size, bins = keys.shape[0], start.shape[0]
    cell = jnp.arange(size, dtype=jnp.int32)
    started = start[None, :] <= cell[:, None]  # mask [size, bins]
    inside = (start[0] <= cell) & (cell < end[-1])
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
