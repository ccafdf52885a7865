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

from jax_roipool._manual_axes import vary_with

BLOCK = 4
"""Taps of a block along each axis: of two samples, two cells each."""

INDEX_LIMIT = 2**31
"""What an int32 index cannot reach."""


class _Rois(NamedTuple):
    """R RoIs of all groups, and the taps of their rows and columns of bins."""

    image: jax.Array  # int32 [R], of the images of all groups, or any if there is none
    has_image: jax.Array  # bool [R]
    first: tuple[jax.Array, jax.Array]  # int32 [R, bins, runs]
    weight: tuple[jax.Array, jax.Array]  # float32 [R, bins, taps]


class _Axis(NamedTuple):
    """Taps along one axis, `[R, bins, taps]`, a multiple of what a block has."""

    cell: jax.Array
    weight: jax.Array
    counts: jax.Array  # bool [R, bins], whether any tap has a weight
    blocks: jax.Array | int  # as many as the longest bin needs


def weighted_sum(features, cells, rows, columns, *, run):
    """See `jax_roipool._backends.weighted_sum`."""
    *_, H, W, C = features.shape
    shape = (*rows.shape[:3], columns.shape[2], C)
    if 0 in features.shape or 0 in shape:
        return [jnp.zeros(shape, features.dtype)]
    table = _as_table(features)

    def pool(rois):
        down, across = (_axis(rois, axis, run[axis], (H, W)[axis]) for axis in range(2))

        def add_block(i, sums):
            y, row_weights = _block(down, i // across.blocks, sums.dtype)
            x, column_weights = _block(across, i % across.blocks, sums.dtype)
            for t, v in itertools.product(range(y.shape[2]), range(x.shape[2])):
                cell = y[:, :, None, t] * W + x[:, None, :, v]
                weight = row_weights[:, :, None, t] * column_weights[:, None, :, v]
                index = _index(table, rois.image[:, None, None], cell, H * W)
                read = table.at[index].get(mode="promise_in_bounds")
                sums += weight[..., None] * read.astype(sums.dtype)
            return sums

        sums = jnp.zeros((*rois.image.shape, *shape[2:]), _sum_dtype(features))
        sums = _over_blocks(down, across, add_block, vary_with(sums, features, rows))
        return jnp.where(_counts(rois, down, across), sums, 0).astype(features.dtype)

    rois = _rois(cells, rows, columns, run, features.shape[1])
    if max(rows.shape[3], columns.shape[3]) <= BLOCK:
        return [pool(rois).reshape(shape)]

    def one_by_one(rois):
        return lax.map(lambda roi: pool(jax.tree.map(lambda x: x[None], roi))[0], rois)

    return [lax.platform_dependent(rois, cpu=one_by_one, default=pool).reshape(shape)]


def weighted_scatter(pooled, cells, rows, columns, *, run, map_shape):
    """See `jax_roipool._backends.weighted_sum`.

    On a GPU XLA adds in no fixed order, unless `--xla_gpu_deterministic_ops` is among its flags.
    """
    (n, H, W), C = map_shape, pooled.shape[4]
    shape = (pooled.shape[0], *map_shape, C)
    if 0 in shape or pooled.size == 0:
        return [jnp.zeros(shape, pooled.dtype)]
    rois = _rois(cells, rows, columns, run, n)
    cotangents = pooled.reshape(-1, *pooled.shape[2:])
    sums = _as_table(jnp.zeros(shape, _sum_dtype(pooled)))
    sums = vary_with(sums, pooled, rows)

    def add(sums, rois, cotangent, add_block):
        down, across = (_axis(rois, axis, run[axis], (H, W)[axis]) for axis in range(2))
        cotangent = jnp.where(_counts(rois, down, across), cotangent.astype(sums.dtype), 0)

        def step(i, sums):
            y, row_weights = _block(down, i // across.blocks, sums.dtype)
            x, column_weights = _block(across, i % across.blocks, sums.dtype)
            # [R, P, Q, taps of the rows, taps of the columns]
            cell = y[:, :, None, :, None] * W + x[:, None, :, None]
            weight = row_weights[:, :, None, :, None] * column_weights[:, None, :, None]
            image = rois.image[:, None, None, None, None]
            return add_block(sums, image, cell, weight, cotangent)

        return _over_blocks(down, across, step, sums)

    def add_taps(sums, image, cell, weight, cotangent):
        index = _index(sums, image, cell, H * W)
        update = cotangent[:, :, :, None, None] * weight[..., None]
        return sums.at[index].add(update, mode="promise_in_bounds")

    def one_by_one(sums, rois, cotangents):
        def add_roi(sums, operands):
            roi, cotangent = jax.tree.map(lambda x: x[None], operands)
            return add(sums, roi, cotangent, add_taps), None

        return lax.scan(add_roi, sums, (rois, cotangents))[0]

    def at_once(sums, rois, cotangents):
        def tap_by_tap(sums, image, cell, weight, cotangent):
            """What is added at a time is as large as the cotangents, and no larger."""
            for t, v in itertools.product(*map(range, cell.shape[3:])):
                tap = (..., slice(t, t + 1), slice(v, v + 1))
                sums = add_taps(sums, image, cell[tap], weight[tap], cotangent)
            return sums

        return add(sums, rois, cotangents, tap_by_tap)

    sums = lax.platform_dependent(sums, rois, cotangents, cpu=one_by_one, default=at_once)
    return [sums.reshape(shape).astype(pooled.dtype)]


def _sum_dtype(x):
    return x.dtype if x.dtype.itemsize > 4 else jnp.float32


def _as_table(features: jax.Array) -> jax.Array:
    """Cells of all images `[G*n*H*W, C]`, or `[G*n, H*W, C]` if one index is not enough."""
    *_, H, W, C = features.shape
    cells = math.prod(features.shape[:-1])
    if is_symbolic_dim(cells) or cells >= INDEX_LIMIT:
        return features.reshape(-1, H * W, C)
    return features.reshape(-1, C)


def _index(table: jax.Array, image: jax.Array, cell: jax.Array, cells_of_image: int):
    """Of a table's cells."""
    if table.ndim == 2:
        return image * cells_of_image + cell
    return jnp.broadcast_to(image, cell.shape), cell


def _rois(cells, rows, columns, run, images) -> _Rois:
    G, K = cells.shape[:2]
    image = cells[:, :, 0]
    runs_of_rows, runs_of_columns = rows.shape[3] // run[0], columns.shape[3] // run[1]
    P, Q = rows.shape[2], columns.shape[2]
    split = 1 + P * runs_of_rows
    in_group = jnp.clip(image, 0, images - 1)
    return _Rois(
        (in_group + images * lax.broadcasted_iota(jnp.int32, image.shape, 0)).reshape(-1),
        ((image >= 0) & (image < images)).reshape(-1),
        (
            cells[:, :, 1:split].reshape(G * K, P, runs_of_rows),
            cells[:, :, split:].reshape(G * K, Q, runs_of_columns),
        ),
        (rows.reshape(G * K, P, rows.shape[3]), columns.reshape(G * K, Q, columns.shape[3])),
    )


def _axis(rois: _Rois, axis: int, run: int, size: int) -> _Axis:
    """The taps along the rows or the columns, with a cell that has a weight for each."""
    first, weight = rois.first[axis], rois.weight[axis]
    cell = jnp.clip(first[..., None] + lax.iota(jnp.int32, run), 0, size - 1)
    cell, taps = cell.reshape(weight.shape), weight.shape[2]
    has_weight = weight != 0
    other = jnp.where(has_weight, cell, -1).max(axis=2)
    cell = jnp.where(has_weight, cell, jnp.maximum(other, 0)[..., None])
    if taps <= BLOCK:
        return _Axis(cell, weight, other >= 0, 1)
    padding = [(0, 0), (0, 0), (0, -taps % BLOCK)]
    used = jnp.where(has_weight, lax.broadcasted_iota(jnp.int32, weight.shape, 2) + 1, 0)
    return _Axis(
        jnp.pad(cell, padding),
        jnp.pad(weight, padding),
        other >= 0,
        jnp.maximum(-(-used.max() // BLOCK), 1),
    )


def _counts(rois: _Rois, down: _Axis, across: _Axis) -> jax.Array:
    """Whether there is anything in a bin, `[R, P, Q, 1]`."""
    rows = down.counts & rois.has_image[:, None]
    return (rows[:, :, None] & across.counts[:, None])[..., None]


def _block(axis: _Axis, i, dtype) -> tuple[jax.Array, jax.Array]:
    """Cells of block `i`, and their weights in that dtype."""
    if axis.cell.shape[2] <= BLOCK:
        return axis.cell, axis.weight.astype(dtype)
    cell, weight = (
        lax.dynamic_slice_in_dim(x, i * BLOCK, BLOCK, 2) for x in (axis.cell, axis.weight)
    )
    return cell, weight.astype(dtype)


def _over_blocks(down: _Axis, across: _Axis, step, initial):
    """`step(i, result)`, from block to block."""
    if max(down.cell.shape[2], across.cell.shape[2]) <= BLOCK:
        return step(0, initial)
    return lax.fori_loop(0, down.blocks * across.blocks, step, initial)
