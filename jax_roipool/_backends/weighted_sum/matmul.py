"""Matrix products, for TPUs, where gathers and scatters are slow: a weight for each row and column.

The columns come first, so that what is left of the maps is as small as it can be. RoIs are taken a
chunk at a time. All images of a group are multiplied with each RoI's weights, which are 0 but for
its own: flat RoIs on N images cost N times as much as RoIs `[N, K, 4]` do.

0 times NaN is NaN. So where features are not all finite, what is not is left out, and found again
by two more sums. A cotangent that is not finite spreads over the gradient of its image.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jax_roipool._backends.chunks import to_chunks
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

    def with_others(sums):
        touched = jnp.where(is_finite, 0, 1).astype(features.dtype)
        touched = _sum(touched, cells, jnp.abs(rows), jnp.abs(columns), run)
        sign = jnp.where(jnp.isinf(features), jnp.sign(features), 0)
        sign = _sum(sign, cells, rows, columns, run)
        other = jnp.where(sign == touched, jnp.inf, jnp.where(sign == -touched, -jnp.inf, jnp.nan))
        return jnp.where(touched == 0, sums, other.astype(sums.dtype))

    sums = lax.cond(is_finite.all(), lambda sums: sums, with_others, sums)
    return [sums.astype(features.dtype)]


def weighted_scatter(pooled, cells, rows, columns, *, run, map_shape):
    """See `jax_roipool._backends.weighted_sum`."""
    (G, _, _, Q, C), H = pooled.shape, map_shape[1]
    shape = (G, *map_shape, C)
    if 0 in shape or pooled.size == 0:
        return [jnp.zeros(shape, pooled.dtype)]
    dtype = _sum_dtype(pooled)

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


def _sum(features, cells, rows, columns, run):
    """`weighted_sum` of finite features, not yet rounded to their dtype."""
    G, *map_shape, C = features.shape
    (K, P), Q, H = rows.shape[1:3], columns.shape[2], map_shape[1]
    dtype = _sum_dtype(features)
    features = features.astype(dtype)

    def pool_chunk(chunk):
        cells, rows, columns = chunk
        down, across, counts = _dense(cells, rows, columns, run, map_shape, dtype)
        bands = _product("kgqnw,gnhwc->kghqc", across, features)
        return jnp.where(counts, _product("kgph,kghqc->kgpqc", down, bands), 0)

    sums = lax.map(pool_chunk, to_chunks((cells, rows, columns), _rois_at_a_time(G * H * Q * C)))
    sums = jnp.swapaxes(sums, 0, 1).reshape(-1, G, P, Q, C)[:K]
    return jnp.moveaxis(sums, 1, 0)


def _dense(cells, rows, columns, run, map_shape, dtype):
    """The weights of all rows `[..., P, H]`, and of all images' columns `[..., Q, n, W]`.

    And whether there is anything in a bin, `[..., P, Q, 1]`.
    """
    n, *map_size = map_shape
    image, begin, axes = cells[..., 0], 1, []
    for weights, length, size in zip((rows, columns), run, map_size, strict=True):
        bins, taps = weights.shape[-2:]
        end = begin + bins * (taps // length)
        first = cells[..., begin:end].reshape(*image.shape, bins, -1, 1)
        cell = jnp.clip(first + lax.iota(jnp.int32, length), 0, size - 1).reshape(weights.shape)
        is_here = cell[..., None] == lax.iota(jnp.int32, size)
        axes.append(jnp.where(is_here, weights[..., None], 0).sum(-2).astype(dtype))
        begin = end
    down, across = axes
    is_image = image[..., None] == lax.iota(jnp.int32, n)
    across = jnp.where(is_image[..., None, :, None], across[..., None, :], 0)
    counts = (down != 0).any(-1)[..., :, None] & (across != 0).any((-1, -2))[..., None, :]
    return down, across, counts[..., None]


def _sum_dtype(x: jax.Array):
    return x.dtype if x.dtype.itemsize > 4 else jnp.float32


def _rois_at_a_time(elements_per_roi: int) -> int:
    return max(1, CHUNK_BYTES // max(1, 4 * elements_per_roi))
