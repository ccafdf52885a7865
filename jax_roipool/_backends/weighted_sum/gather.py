"""Taps gathered, for CPUs and GPUs: blocks of 4x4 taps of every bin at a time.

XLA makes one loop of a sum of gathers, without an intermediate. Two samples an axis are one block.
More taps take as many blocks as the longest bin has; on a CPU RoI after RoI, so that each takes its
own number, and what it pools to stays in a cache.

A tap of weight 0 reads the cell of another one of its bin, as 0 times NaN would be NaN.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from jax_roipool._backends.sums import sum_dtype
from jax_roipool._backends.weighted_sum.cells import unpack
from jax_roipool._manual_axes import vary_with

BLOCK = 4
"""Taps of a block along each axis: of two samples, two cells each."""

INDEX_LIMIT = 2**31
"""What an int32 index cannot reach."""


class _Axis(NamedTuple):
    """Taps of R RoIs along one axis: at most a block, or as many as whole blocks can reach."""

    cell: jax.Array  # int32 [R, bins, taps], inside of the map
    weight: jax.Array | None  # [R, bins, taps], if they have one
    counts: jax.Array  # bool [R, bins], whether a bin has anything
    used: jax.Array  # int32 [R], after how many taps of a bin there is nothing


class _Rois(NamedTuple):
    """R RoIs of all groups."""

    image: jax.Array  # int32 [R], of the images of all groups, or any if there is none
    has_image: jax.Array  # bool [R]
    rows: _Axis
    columns: _Axis


def weighted_sum(features, cells, rows, columns, *, run):
    """See `jax_roipool._backends.weighted_sum`."""
    shape = (*rows.shape[:3], columns.shape[2], features.shape[4])
    if 0 in features.shape or 0 in shape:
        return [jnp.zeros(shape, features.dtype)]
    dtype = sum_dtype(features)
    read = _reader(features, dtype)

    def pool(rois):
        def add_block(starts, rows, columns, sums):
            del starts
            for t, v in itertools.product(range(rows.cell.shape[2]), range(columns.cell.shape[2])):
                weight = rows.weight[:, :, None, t] * columns.weight[:, None, :, v]
                sums += weight[..., None] * read(rois, rows, columns, t, v)
            return sums

        sums = jnp.zeros((*rois.image.shape, *shape[2:]), dtype)
        sums = _over_blocks(rois, add_block, vary_with(sums, features, rows))
        return jnp.where(_counts(rois), sums, 0).astype(features.dtype)

    shapes = rows.shape, columns.shape
    rois = _rois(cells, (rows, columns), shapes, run, features.shape[1:4], dtype)
    return [_map_rois(pool, rois, shapes).reshape(shape)]


def weighted_scatter(pooled, cells, rows, columns, *, run, map_shape):
    """See `jax_roipool._backends.weighted_sum`.

    On a GPU XLA adds in no fixed order, unless `--xla_gpu_deterministic_ops` is among its flags.
    """
    (n, H, W), C = map_shape, pooled.shape[4]
    shape = (pooled.shape[0], n, H, W, C)
    if 0 in shape or pooled.size == 0:
        return [jnp.zeros(shape, pooled.dtype)]
    dtype = sum_dtype(pooled)

    def add(sums, rois, cotangents, add_taps):
        cotangents = jnp.where(_counts(rois), cotangents.astype(dtype), 0)

        def add_block(starts, rows, columns, sums):
            del starts
            # [R, P, Q, taps of rows, taps of columns]
            cell = rows.cell[:, :, None, :, None] * W + columns.cell[:, None, :, None]
            weight = rows.weight[:, :, None, :, None] * columns.weight[:, None, :, None]
            return add_taps(sums, rois, cell, weight, cotangents)

        return _over_blocks(rois, add_block, sums)

    def add_taps(sums, rois, cell, weight, cotangents):
        update = cotangents[:, :, :, None, None] * weight[..., None]
        return sums.at[_index(sums, rois, cell, H * W)].add(update, mode="promise_in_bounds")

    def one_by_one(sums, rois, cotangents):
        def add_roi(sums, operands):
            roi, cotangent = jax.tree.map(lambda x: x[None], operands)
            return add(sums, roi, cotangent, add_taps), None

        return lax.scan(add_roi, sums, (rois, cotangents))[0]

    def at_once(sums, rois, cotangents):
        def add_tap_by_tap(sums, rois, cell, weight, cotangents):
            """So that what is added at a time is no larger than the cotangents."""
            for t, v in itertools.product(*map(range, cell.shape[3:])):
                tap = (..., slice(t, t + 1), slice(v, v + 1))
                sums = add_taps(sums, rois, cell[tap], weight[tap], cotangents)
            return sums

        return add(sums, rois, cotangents, add_tap_by_tap)

    rois = _rois(cells, (rows, columns), (rows.shape, columns.shape), run, map_shape, dtype)
    cotangents = pooled.reshape(-1, *pooled.shape[2:])
    sums = vary_with(_as_table(jnp.zeros(shape, dtype)), pooled, rows)
    sums = lax.platform_dependent(sums, rois, cotangents, cpu=one_by_one, default=at_once)
    return [sums.reshape(shape).astype(pooled.dtype)]


def row_weights(features, pooled, cells, columns, *, run, taps):
    """See `jax_roipool._backends.weighted_sum`."""
    shapes = (*pooled.shape[:3], *taps), columns.shape
    return [_weights(features, pooled, cells, (None, columns), shapes, run, axis=0)]


def column_weights(features, pooled, cells, rows, *, run, taps):
    """See `jax_roipool._backends.weighted_sum`."""
    shapes = rows.shape, (*pooled.shape[:2], pooled.shape[3], *taps)
    return [_weights(features, pooled, cells, (rows, None), shapes, run, axis=1)]


def _weights(features, pooled, cells, weights, shapes, run, axis):
    """What stands beside the weights along `axis`; `shapes` are those of both axes' weights."""
    shape = shapes[axis]
    if 0 in features.shape or 0 in pooled.shape or 0 in shape:
        return jnp.zeros(shape, jnp.float32)
    dtype = sum_dtype(features)
    read = _reader(features, dtype)

    def weigh(operands):
        rois, pooled = operands
        pooled = jnp.where(_counts(rois), pooled.astype(dtype), 0)

        def add_block(starts, rows, columns, sums):
            along, across = (rows, columns)[axis], (columns, rows)[axis]
            found = []
            for i in range(along.cell.shape[2]):
                line = jnp.zeros_like(pooled)
                for j in range(across.cell.shape[2]):
                    weight = jnp.expand_dims(across.weight[:, :, j], 1 + axis)[..., None]
                    line += weight * read(rois, rows, columns, *((i, j), (j, i))[axis])
                found.append((pooled * line).sum((2 - axis, 3)))
            found = jnp.stack(found, axis=-1)
            before = lax.dynamic_slice_in_dim(sums, starts[axis], len(found[0, 0]), 2)
            return lax.dynamic_update_slice_in_dim(sums, before + found, starts[axis], 2)

        along = (rois.rows, rois.columns)[axis]
        sums = vary_with(jnp.zeros(along.cell.shape, dtype), features, pooled, along.cell)
        return _over_blocks(rois, add_block, sums)[..., : shape[3]]

    rois = _rois(cells, weights, shapes, run, features.shape[1:4], dtype)
    operands = rois, pooled.reshape(-1, *pooled.shape[2:])
    return _map_rois(weigh, operands, shapes).reshape(shape).astype(jnp.float32)


def _as_table(features: jax.Array) -> jax.Array:
    """Cells of all images `[G*n*H*W, C]`, or `[G*n, H*W, C]` if one index is not enough."""
    G, n, H, W, C = features.shape
    cells = math.prod((G, n, H, W))
    if is_symbolic_dim(cells) or cells >= INDEX_LIMIT:
        return features.reshape(G * n, H * W, C)
    return features.reshape(cells, C)


def _index(table: jax.Array, rois: _Rois, cell: jax.Array, cells_of_image: int):
    """Of a table's cells, those of `[R, ...]`, which count from the RoI's image on."""
    image = rois.image.reshape(-1, *[1] * (cell.ndim - 1))
    if table.ndim == 2:
        return image * cells_of_image + cell
    return jnp.broadcast_to(image, cell.shape), cell


def _reader(features: jax.Array, dtype):
    """A function that gives the features at taps `t` and `v` of all bins, `[R, P, Q, C]`."""
    table, (H, W) = _as_table(features), features.shape[2:4]

    def read(rois, rows, columns, t, v):
        cell = rows.cell[:, :, None, t] * W + columns.cell[:, None, :, v]
        index = _index(table, rois, cell, H * W)
        return table.at[index].get(mode="promise_in_bounds").astype(dtype)

    return read


def _rois(cells, weights, shapes, run, map_shape, dtype) -> _Rois:
    """All RoIs, with weights of rows and columns in that dtype, of those shapes, or None."""
    images, *map_size = map_shape
    cells = unpack(cells, shapes[0], shapes[1], run)
    image = jnp.clip(cells.image_index, 0, images - 1)
    image += images * lax.broadcasted_iota(jnp.int32, image.shape, 0)
    rows, columns = (
        _axis(first, weight, cells.counts[..., axis], run[axis], shapes[axis][-1], size, dtype)
        for axis, (first, weight, size) in enumerate(
            zip((cells.rows, cells.columns), weights, map_size, strict=True)
        )
    )
    has_image = (cells.image_index >= 0) & (cells.image_index < images)
    rois = _Rois(image, has_image, rows, columns)
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), rois)


def _axis(first, weight, count, run, taps, size, dtype) -> _Axis:
    """The taps along one axis, `[G, K, ...]`, with a cell that has a weight for each."""
    cell = jnp.clip(first[..., None] + lax.iota(jnp.int32, run), 0, size - 1)
    cell = cell.reshape(*cell.shape[:3], taps)
    used = jnp.clip(count, 0, taps)
    padding = [(0, 0)] * 3 + [(0, 0 if _is_one_block(taps) else BLOCK - 1)]
    if weight is None:
        return _Axis(jnp.pad(cell, padding), None, jnp.full(cell.shape[:3], True), used)
    has_weight = weight != 0
    other = jnp.where(has_weight, cell, -1).max(axis=3)
    cell = jnp.where(has_weight, cell, jnp.maximum(other, 0)[..., None])
    weight = jnp.pad(weight.astype(dtype), padding)
    return _Axis(jnp.pad(cell, padding), weight, other >= 0, used)


def _is_one_block(taps: int) -> bool:
    """What is symbolic may be more."""
    return not is_symbolic_dim(taps) and taps <= BLOCK


def _counts(rois: _Rois) -> jax.Array:
    """Whether there is anything in a bin, `[R, P, Q, 1]`."""
    rows = rois.rows.counts & rois.has_image[:, None]
    return (rows[:, :, None] & rois.columns.counts[:, None])[..., None]


def _map_rois(function, operands, shapes):
    """`function` of RoIs and more, on a CPU one by one where they need several blocks."""

    def one_by_one(operands):
        return lax.map(lambda x: function(jax.tree.map(lambda x: x[None], x))[0], operands)

    if all(_is_one_block(taps) for *_, taps in shapes):
        return function(operands)
    return lax.platform_dependent(operands, cpu=one_by_one, default=function)


def _over_blocks(rois: _Rois, step, result):
    """`step(starts, rows, columns, result)` from block to block, which has the first taps."""
    axes = rois.rows, rois.columns
    if all(_is_one_block(axis.cell.shape[2]) for axis in axes):
        return step((0, 0), *axes, result)
    down, across = (jnp.maximum(-(-axis.used.max() // BLOCK), 1) for axis in axes)

    def block(axis, start):
        if _is_one_block(axis.cell.shape[2]):
            return axis
        cell, weight = (
            None if x is None else lax.dynamic_slice_in_dim(x, start, BLOCK, 2)
            for x in (axis.cell, axis.weight)
        )
        return axis._replace(cell=cell, weight=weight)

    def body(i, result):
        starts = i // across * BLOCK, i % across * BLOCK
        rows, columns = map(block, axes, starts)
        return step(starts, rows, columns, result)

    return lax.fori_loop(0, down * across, body, result)
