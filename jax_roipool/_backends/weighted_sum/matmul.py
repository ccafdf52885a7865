"""Matrix products, for TPUs, where gathers and scatters are slow: a weight for each row and column.

The columns come first, so that what is left of the maps is as small as it can be. RoIs are taken a
chunk at a time. All images of a group are multiplied with each RoI's weights, which are 0 but for
its own: flat RoIs on N images cost N times as much as RoIs `[N, K, 4]` do.

0 times NaN is NaN. So where features are not all finite, what is not is left out, and the bins that
have a weight for it are found by a second sum. A cotangent that is not finite spreads over the
gradient of its image, and a feature that is not over the derivatives by its image's weights.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax

from jax_roipool._backends.chunks import map_chunks, to_chunks
from jax_roipool._backends.sums import sum_dtype
from jax_roipool._backends.weighted_sum.cells import unpack
from jax_roipool._manual_axes import vary_with

CHUNK_BYTES = 1 << 26
"""RoIs are taken so many at a time that what is left of their maps takes about this much."""

_product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def weighted_sum(features, cells, rows, columns, *, run):
    """See `jax_roipool._backends.weighted_sum`."""
    (G, K, P, _), Q, C = rows.shape, columns.shape[2], features.shape[4]
    if 0 in features.shape or 0 in rows.shape or 0 in columns.shape:
        return [jnp.zeros((G, K, P, Q, C), features.dtype)]
    is_finite = jnp.isfinite(features)
    sums = _sum(jnp.where(is_finite, features, 0), cells, rows, columns, run)

    def mark_others(sums):
        others = jnp.where(is_finite, 0, 1).astype(features.dtype)
        touched = _sum(others, cells, jnp.abs(rows), jnp.abs(columns), run)
        return jnp.where(touched > 0, jnp.nan, sums)

    sums = lax.cond(is_finite.all(), lambda sums: sums, mark_others, sums)
    return [sums.astype(features.dtype)]


def weighted_scatter(pooled, cells, rows, columns, *, run, map_shape):
    """See `jax_roipool._backends.weighted_sum`."""
    (G, _, _, Q, C), H = pooled.shape, map_shape[1]
    shape = (G, *map_shape, C)
    if 0 in shape or pooled.size == 0:
        return [jnp.zeros(shape, pooled.dtype)]
    dtype = sum_dtype(pooled)

    def add_chunk(sums, chunk):
        pooled, cells, rows, columns = chunk
        down, across, counts = _dense(cells, rows, columns, run, map_shape, dtype)
        pooled = jnp.where(counts, pooled.astype(dtype), 0)
        bands = _product("kgph,kgpqc->kghqc", down, pooled)
        return sums + _product("kgqnw,kghqc->gnhwc", across, bands), None

    operands = pooled, cells, rows, columns
    chunks = to_chunks(operands, _rois_at_a_time(G * H * Q * C))
    sums = vary_with(jnp.zeros(shape, dtype), *operands)
    return [lax.scan(add_chunk, sums, chunks)[0].astype(pooled.dtype)]


def row_weights(features, pooled, cells, columns, *, run, taps):
    """See `jax_roipool._backends.weighted_sum`."""
    G, K, P, Q, C = pooled.shape
    n, H, W = features.shape[1:4]
    if 0 in features.shape or 0 in pooled.shape or 0 in columns.shape or 0 in taps:
        return [jnp.zeros((G, K, P, *taps), jnp.float32)]
    dtype = sum_dtype(features)
    features = features.astype(dtype)

    def weigh(pooled, cells, columns):
        rows = jnp.ones((*pooled.shape[:3], *taps), jnp.float32)
        _, across, counts = _dense(cells, rows, columns, run, (n, H, W), dtype)
        pooled = jnp.where(counts, pooled.astype(dtype), 0)
        bands = _product("kgqnw,gnhwc->kghqc", across, features)
        weights = _product("kgpqc,kghqc->kgph", pooled, bands)
        first = unpack(cells, rows.shape, columns.shape, run).rows
        return jnp.where(_is_at(first, run[0], H), weights[..., None, :], 0).sum(-1)

    weights = map_chunks(weigh, (pooled, cells, columns), _rois_at_a_time(G * H * Q * C))
    return [weights.astype(jnp.float32)]


def column_weights(features, pooled, cells, rows, *, run, taps):
    """See `jax_roipool._backends.weighted_sum`."""
    G, K, _, Q, C = pooled.shape
    n, H, W = features.shape[1:4]
    if 0 in features.shape or 0 in pooled.shape or 0 in rows.shape or 0 in taps:
        return [jnp.zeros((G, K, Q, *taps), jnp.float32)]
    dtype = sum_dtype(features)
    features = features.astype(dtype)

    def weigh(pooled, cells, rows):
        columns = jnp.ones((*pooled.shape[:2], Q, *taps), jnp.float32)
        down, _, counts = _dense(cells, rows, columns, run, (n, H, W), dtype)
        pooled = jnp.where(counts, pooled.astype(dtype), 0)
        bands = _product("kgph,kgpqc->kghqc", down, pooled)
        weights = _product("kghqc,gnhwc->kgqnw", bands, features)
        image, _, _, first = unpack(cells, rows.shape, columns.shape, run)
        is_image = image[..., None] == lax.iota(jnp.int32, n)
        weights = jnp.where(is_image[..., None, :, None], weights, 0).sum(-2)
        return jnp.where(_is_at(first, run[1], W), weights[..., None, :], 0).sum(-1)

    weights = map_chunks(weigh, (pooled, cells, rows), _rois_at_a_time(G * H * Q * C))
    return [weights.astype(jnp.float32)]


def _sum(features, cells, rows, columns, run):
    """`weighted_sum` of finite features, not yet rounded to their dtype."""
    G, *map_shape, C = features.shape
    dtype = sum_dtype(features)
    features = features.astype(dtype)

    def pool_chunk(cells, rows, columns):
        down, across, counts = _dense(cells, rows, columns, run, map_shape, dtype)
        bands = _product("kgqnw,gnhwc->kghqc", across, features)
        return jnp.where(counts, _product("kgph,kghqc->kgpqc", down, bands), 0)

    chunk = _rois_at_a_time(G * map_shape[1] * columns.shape[2] * C)
    return map_chunks(pool_chunk, (cells, rows, columns), chunk)


def _dense(cells, rows, columns, run, map_shape, dtype):
    """The weights of all rows `[..., P, H]`, and of all images' columns `[..., Q, n, W]`.

    And whether there is anything in a bin, `[..., P, Q, 1]`.
    """
    n, *map_size = map_shape
    image, _, *first = unpack(cells, rows.shape, columns.shape, run)
    down, across = (
        jnp.where(_is_at(first, length, size), weights[..., None], 0).sum(-2).astype(dtype)
        for first, weights, length, size in zip(first, (rows, columns), run, map_size, strict=True)
    )
    is_image = image[..., None] == lax.iota(jnp.int32, n)
    across = jnp.where(is_image[..., None, :, None], across[..., None, :], 0)
    counts = (down != 0).any(-1)[..., :, None] & (across != 0).any((-1, -2))[..., None, :]
    return down, across, counts[..., None]


def _is_at(first, run, size):
    """Whether taps are at each cell of an axis, `[..., bins, taps, cells]`."""
    cell = jnp.clip(first[..., None] + lax.iota(jnp.int32, run), 0, size - 1)
    cell = cell.reshape(*first.shape[:-1], first.shape[-1] * run, 1)
    return cell == lax.iota(jnp.int32, size)


def _rois_at_a_time(elements_per_roi: int) -> int:
    return max(1, CHUNK_BYTES // max(1, 4 * elements_per_roi))
