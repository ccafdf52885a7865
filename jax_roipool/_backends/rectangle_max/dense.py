"""A portable backend without scatter: cells and bins are compared, each with each, axis by axis.

That is more work than `segment_max.py` does, but a scatter is a sequential loop on a TPU, and a
comparison can be split over devices along every axis.

A column of a row of bins holds at most one argmax per channel, as the first maximum of that column
is the same cell for all bins of the row that share it. So the gradient, too, goes axis by axis:
along the columns to where the argmaxes are, then along the rows.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jax_roipool._backends.chunks import map_in_chunks, to_chunks
from jax_roipool._backends.rectangle_max.ordered import from_bits, to_bits
from jax_roipool._backends.rectangle_max.portable import (
    first_maximum,
    has_image,
    image_of,
    nothing,
    pool_in_chunks,
    split_edges,
)
from jax_roipool._backends.sums import sum_dtype
from jax_roipool._manual_axes import vary_with

CHUNK_BYTES = 1 << 26
"""RoIs are taken so many at a time that what is left of their maps takes about this much."""


def rectangle_max(features, edges, *, output_size, argmax_dtype, empty_value):
    """See `jax_roipool._backends.rectangle_max`."""
    groups, images, height, width, channels = features.shape
    columns = output_size[1] + (width if images > 1 else 0)  # or its own image, a copy
    return pool_in_chunks(
        functools.partial(_pool_roi, with_argmax=argmax_dtype is not None),
        features,
        edges,
        _rois_at_a_time(groups * height * columns * channels),
        output_size=output_size,
        argmax_dtype=argmax_dtype,
        empty_value=empty_value,
    )


def gather_at_argmax(features, argmax, edges):
    """See `jax_roipool._backends.rectangle_max`."""
    if 0 in features.shape or argmax.size == 0:
        return [jnp.zeros(argmax.shape, features.dtype)]
    groups, images, height, width, channels = features.shape
    # As integers: a sum of floats may take a subnormal for zero.
    rows = to_bits(features, jnp.int32 if features.dtype.itemsize < 4 else None)
    rows = rows.reshape(groups, images * height, width, channels)

    def gather_roi(rows, argmax, edges):
        in_column, row_at = _columns(argmax, edges, (images, height, width))
        row = jnp.arange(images * height, dtype=jnp.int32)[:, None, None, None]
        at_row = jnp.where(row_at[None] == row, rows[:, None], 0)
        at_row = at_row.sum(axis=0, dtype=rows.dtype)  # [P, W, C]
        return jnp.where(in_column, at_row[:, :, None], 0).sum(axis=1, dtype=rows.dtype)

    (gathered,) = map_in_chunks(
        lambda argmax, edges: (jax.vmap(gather_roi)(rows, argmax, edges),),
        (argmax, edges),
        _rois_at_a_time(argmax.shape[2] * width * channels * groups),
    )
    return [from_bits(gathered, features.dtype)]


def scatter_at_argmax(cotangent, argmax, edges, *, map_shape):
    """See `jax_roipool._backends.rectangle_max`."""
    groups, _, bin_rows, _, channels = cotangent.shape
    images, height, width = map_shape
    shape = (groups, *map_shape, channels)
    if 0 in shape or cotangent.size == 0:
        return [jnp.zeros(shape, cotangent.dtype)]
    dtype = sum_dtype(cotangent)

    def to_columns(cotangent, argmax, edges):
        in_column, row_at = _columns(argmax, edges, map_shape)
        cotangent = jnp.where(in_column, cotangent[:, None].astype(dtype), 0)
        return cotangent.sum(axis=2), row_at  # [P, W, C]

    def add_chunk(sums, operands):
        columns, row_at = jax.vmap(jax.vmap(to_columns))(*operands)  # [RoIs, G, P, W, C]
        row = jnp.arange(images * height, dtype=jnp.int32)[:, None, None, None, None, None]
        sums += jnp.where(row_at[None] == row, columns[None], 0).sum(axis=(1, 3))
        return sums, None

    operands = cotangent, argmax, edges
    chunks = to_chunks(operands, _rois_at_a_time(groups * bin_rows * width * channels))
    sums = jnp.zeros((images * height, groups, width, channels), dtype)
    sums, _ = lax.scan(add_chunk, vary_with(sums, *operands), chunks)
    return [jnp.moveaxis(sums, 1, 0).reshape(shape).astype(cotangent.dtype)]


def _rois_at_a_time(elements_per_roi: int) -> int:
    return max(1, CHUNK_BYTES // max(1, 8 * elements_per_roi))  # a value and an index


def _pool_roi(keys, image_index, row_start, row_end, col_start, col_end, *, with_argmax):
    """The maxima of one RoI in `keys` `[n, W, H, C]`, and argmaxes if asked for: `[P, Q, C]`."""
    cells = [image_of(keys, image_index)]
    if with_argmax:
        cells.append(lax.broadcasted_iota(jnp.int32, cells[0].shape, 0))
    over_cols = _max_over_bins(cells, col_start, col_end)  # [Q, H, C]
    over_cols = [jnp.swapaxes(x, 0, 1) for x in over_cols]
    if with_argmax:
        width, shape = keys.shape[1], over_cols[1].shape
        over_cols[1] += width * lax.broadcasted_iota(jnp.int32, shape, 0)
    return _max_over_bins(over_cols, row_start, row_end)


def _max_over_bins(keys_and_index, start, end):
    """Maximum of keys `[cells, ...]` over bins, `[bins, ...]`, and the smallest index that has it.

    The index is left out if it is left out of the argument, as XLA would work it out.
    """
    size = keys_and_index[0].shape[0]
    cell = jnp.arange(size, dtype=jnp.int32)
    inside = (start[:, None] <= cell[None]) & (cell[None] < end[:, None])
    inside = inside.reshape(*inside.shape, *[1] * (keys_and_index[0].ndim - 1))
    lowest = nothing(keys_and_index)
    masked = [jnp.where(inside, x[None], n) for x, n in zip(keys_and_index, lowest, strict=True)]
    if len(masked) == 1:
        return [masked[0].max(axis=1)]
    return list(lax.reduce(tuple(masked), tuple(lowest), first_maximum, dimensions=(1,)))


def _columns(argmax, edges, map_shape):
    """Whether a bin's argmax is in a column, and the row, of all images', that it has there.

    Of one RoI's argmax `[P, Q, C]`: `[P, W, Q, C]`, and `[P, W, C]`, -1 where no argmax is.
    """
    images, height, width = map_shape
    image_index, *_ = split_edges(edges, argmax.shape[:2])
    argmax = argmax.astype(jnp.int32)
    found = has_image(image_index, images) & (argmax >= 0)
    row = jnp.where(found, argmax // width + image_index * height, -1)[:, None]
    col = jnp.where(found, argmax % width, -1)[:, None]
    in_column = col == jnp.arange(width, dtype=jnp.int32)[None, :, None, None]
    return in_column, jnp.where(in_column, row, -1).max(axis=2)
