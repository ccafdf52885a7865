"""The portable backend: bin masks, `jax.ops.segment_max`, and indexing at the argmax.

Features are compared as integers of the same order, where NaN is the largest, so that every
platform's integer maximum gives the same bits. The maximum over a rectangle is separable: first
over columns, keeping the smallest column, then over rows, keeping the smallest row, which is the
first maximum in row-major order.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

CHUNK_BYTES = 1 << 22
"""RoIs are pooled so many at a time that a copy of their feature maps takes about this much.

Measured on two CPU cores: a larger chunk leaves the cache and is three times slower.
"""

INDEX_LIMIT = 2**31
"""What an int32 index cannot reach."""


def rectangle_max(
    features, image_index, row_start, row_end, col_start, col_end, *, argmax_dtype, empty_value
):
    """See `jax_roipool._rectangle_max`: maxima, and argmaxes if asked for, `[G, K, P, Q, C]`."""
    groups, images, height, width, channels = features.shape
    rois, bin_rows, bin_cols = *row_start.shape[1:], col_start.shape[2]
    if 0 in features.shape or rois == 0:
        shape = (groups, rois, bin_rows, bin_cols, channels)
        pooled = jnp.zeros(shape, features.dtype)
        return [pooled, jnp.full(shape, -1, argmax_dtype)] if argmax_dtype else [pooled]

    keys = jnp.moveaxis(_to_key(features), 3, 2)  # columns lead: the first pass runs over them
    results_wanted = 2 if argmax_dtype else 1  # what is not wanted, XLA does not compute
    bytes_per_roi = groups * height * width * channels * features.dtype.itemsize
    results = _map_in_chunks(
        lambda rectangles: jax.vmap(_pool_roi)(keys, *rectangles)[:results_wanted],
        (image_index, row_start, row_end, col_start, col_end),
        max(1, CHUNK_BYTES // bytes_per_roi),
    )
    pooled = _from_key(results[0], features.dtype)

    no_cells = (row_end <= row_start)[..., :, None] | (col_end <= col_start)[..., None, :]
    no_image = (image_index < 0) | (image_index >= images)
    no_cells, no_image = no_cells[..., None], no_image[..., None, None, None]
    empty = _lowest(features.dtype) if empty_value < 0 else 0
    pooled = jnp.where(no_image, 0, jnp.where(no_cells, empty, pooled)).astype(features.dtype)
    if argmax_dtype is None:
        return [pooled]
    return [pooled, jnp.where(no_image | no_cells, -1, results[1]).astype(argmax_dtype)]


def gather_at_argmax(features, argmax, image_index):
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


def scatter_at_argmax(cotangent, argmax, image_index, *, map_shape):
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


def _map_in_chunks(pool, rectangles, chunk):
    """`pool`, over RoI after RoI of all groups, in chunks of equal size; `[G, K, ...]` again."""
    rois = rectangles[0].shape[1]
    steps = math.ceil(rois / chunk)
    chunk = math.ceil(rois / steps)

    def to_steps(x):
        x = jnp.pad(x, [(0, 0), (0, steps * chunk - rois)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x, 1, 0).reshape(steps, chunk, x.shape[0], *x.shape[2:])

    def from_steps(x):
        x = x.reshape(steps * chunk, *x.shape[2:])[:rois]
        return jnp.moveaxis(x, 0, 1)

    results = lax.map(jax.vmap(pool), tuple(map(to_steps, rectangles)))
    return [from_steps(result) for result in results]


def _pool_roi(keys, image_index, row_start, row_end, col_start, col_end):
    """Maxima and argmaxes, `[P, Q, C]`, of one RoI in `keys` `[n, W, H, C]`.

    What it gives for a rectangle without cells, or an image that is not there, means nothing.
    """
    images, width = keys.shape[:2]
    image = keys[0] if images == 1 else keys[jnp.clip(image_index, 0, images - 1)]
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


def _to_key(features):
    """Integers in the order of the features: NaN largest, zeros equal.

    Not one float is compared: a platform may take a subnormal for zero.
    """
    dtype = features.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        return features
    integer = _integer_like(dtype)
    largest = jnp.iinfo(integer).max
    bits = lax.bitcast_convert_type(features, integer)
    magnitude = bits & largest
    infinity = np.array(np.inf, dtype).view(integer)
    keys = jnp.where(bits < 0, -magnitude, magnitude)
    return jnp.where(magnitude > infinity, largest, keys)


def _from_key(keys, dtype):
    if not jnp.issubdtype(dtype, jnp.floating):
        return keys
    sign = jnp.iinfo(keys.dtype).min
    return lax.bitcast_convert_type(jnp.where(keys < 0, -keys | sign, keys), dtype)


def _integer_like(dtype):
    return {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[dtype.itemsize]


def _lowest(dtype):
    return -jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min
