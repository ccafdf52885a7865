"""A portable backend by lookup: a table of the maxima over windows of cells.

The table has the maximum of every window of 2^a rows and 2^b columns; the argmax comes along as the
index of the first maximum. As a maximum may count a cell twice, two windows along each axis cover a
bin: its maximum takes four rows of the table, however many cells it has.

Windows reach up to the bins of a RoI as large as the map. Where one sticks out of the map and has
larger bins, `xla.py` pools.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_roipool._backends import xla
from jax_roipool._backends.portable import INDEX_LIMIT, first_maximum, nothing, pool_by_keys
from jax_roipool._manual_axes import vary_with

CHANNELS, TABLE_BYTES = 16, 1 << 23
"""A table is of that many channels of one group at least, and beyond that of no more bytes.

Measured on two CPU cores: a larger table leaves the cache and is up to eight times slower.
"""

gather_at_argmax = xla.gather_at_argmax
scatter_at_argmax = xla.scatter_at_argmax


def rectangle_max(features, *rectangles, argmax_dtype, empty_value):
    """See `jax_roipool._rectangle_max`: maxima, and argmaxes if asked for, `[G, K, P, Q, C]`."""
    starts, ends = rectangles[1::2], rectangles[2::2]
    _, images, height, width, channels = features.shape
    levels = tuple(
        _levels(size, start.shape[2]) for size, start in zip((height, width), starts, strict=True)
    )
    windows = math.prod(levels) * images * height * width
    by_xla = functools.partial(
        xla.rectangle_max, argmax_dtype=argmax_dtype, empty_value=empty_value
    )
    if windows >= INDEX_LIMIT:
        return by_xla(features, *rectangles)
    bytes_per_window = features.dtype.itemsize + (argmax_dtype.itemsize if argmax_dtype else 0)
    channels_that_fit = TABLE_BYTES // max(1, windows * bytes_per_window)  # of one group
    channels_at_once = max(CHANNELS, channels_that_fit)
    groups_at_once = min(channels_at_once // max(1, channels), INDEX_LIMIT // max(1, windows))

    def by_table(features, *rectangles):
        pool = functools.partial(
            _pool_groups,
            rectangles=rectangles,
            levels=levels,
            argmax_dtype=argmax_dtype,
            groups_at_once=groups_at_once,
            channels_at_once=channels_at_once,
        )
        return pool_by_keys(
            pool, features, rectangles, argmax_dtype=argmax_dtype, empty_value=empty_value
        )

    if 2 ** levels[0] >= height and 2 ** levels[1] >= width:
        return by_table(features, *rectangles)
    rows, cols = (
        (end - start > 2**n).any() for n, start, end in zip(levels, starts, ends, strict=True)
    )
    return lax.cond(rows | cols, by_xla, by_table, features, *rectangles)


def _levels(size: int, bins: int) -> int:
    """How many sizes of windows, 1, 2, 4 and so on, two of which cover every bin inside the map."""
    longest = min(size, math.ceil(size / bins) + 1)
    return max(1, (longest - 1).bit_length())


def _pool_groups(keys, rectangles, groups_at_once, **options):
    """Maxima, and argmaxes if asked for, `[G, K, P, Q, C]`, all by one table or group by group."""
    groups, images = keys.shape[:2]
    image_index, *edges = rectangles
    image_index = jnp.clip(image_index, 0, images - 1)
    pool = functools.partial(_pool_images, **options)
    if groups > groups_at_once:
        return lax.map(lambda group: pool(*group), (keys, image_index, *edges))
    image_index += images * jnp.arange(groups, dtype=jnp.int32)[:, None]
    together = (x.reshape(-1, *x.shape[2:]) for x in (keys, image_index, *edges))
    return [x.reshape(groups, -1, *x.shape[1:]) for x in pool(*together)]


def _pool_images(keys, *rectangles, levels, argmax_dtype, channels_at_once):
    """Maxima, and argmaxes if asked for, `[K, P, Q, C]`, of keys `[n, H, W, C]`."""
    image_index, row_start, row_end, col_start, col_end = rectangles
    _, height, width, channels = keys.shape
    rows = _cover(row_start, row_end, height, levels[0])
    cols = _cover(col_start, col_end, width, levels[1])

    def pool(keys):
        cells = [keys]
        if argmax_dtype:
            cell = np.arange(height * width, dtype=argmax_dtype).reshape(height, width, 1)
            cells.append(jnp.broadcast_to(cell, keys.shape))
        return _look_up(_table(cells, levels), image_index, rows, cols)

    blocks = math.ceil(channels / channels_at_once)
    if blocks == 1:
        return pool(keys)
    block = math.ceil(channels / blocks)

    def pool_block(results, first):
        pooled = pool(lax.dynamic_slice_in_dim(keys, first, block, axis=3))
        return [
            lax.dynamic_update_slice_in_dim(x, part, first, axis=3)
            for x, part in zip(results, pooled, strict=True)
        ], None

    # Where the last block would reach too far, both slices begin sooner, at the same channel.
    firsts = block * np.arange(blocks, dtype=np.int32)
    shape = (*row_start.shape, col_start.shape[1], channels)
    results = [jnp.zeros(shape, dtype) for dtype in (keys.dtype, argmax_dtype) if dtype]
    results = [vary_with(x, keys, *rectangles) for x in results]
    results, _ = lax.scan(pool_block, results, firsts)
    return results


def _table(cells, levels):
    """Of every cell the maximum of the windows that start there: `[a, b, n, H, W, C]` by level.

    A window that sticks out of the map has the maximum of what is inside.
    """
    by_rows = [cells]
    for a in range(1, levels[0]):
        by_rows.append(_widened(by_rows[-1], 1, 2 ** (a - 1)))
    by_both = []
    for windows in by_rows:
        by_both.append(windows)
        for b in range(1, levels[1]):
            by_both.append(_widened(by_both[-1], 2, 2 ** (b - 1)))
    return [jnp.stack(x).reshape(*levels, *x[0].shape) for x in zip(*by_both, strict=True)]


def _widened(cells, axis, by):
    """The maximum of each cell and the one that is `by` after it, if there is one."""
    two = tuple(2 if i == axis else 1 for i in range(4))
    apart = tuple(by if i == axis else 1 for i in range(4))
    behind = tuple((0, by if i == axis else 0) for i in range(4))
    # One kernel on a GPU; of slices and comparisons XLA makes several.
    return lax.reduce_window(
        tuple(cells), tuple(nothing(cells)), _maximum, two, (1,) * 4, behind, window_dilation=apart
    )


class _Windows(NamedTuple):
    """How two windows cover each bin along one axis: `[K, bins]`."""

    level: jax.Array
    starts: tuple[jax.Array, jax.Array]


def _cover(start, end, size, levels):
    level = jnp.minimum(31 - lax.clz(jnp.maximum(end - start, 1)), levels - 1)
    first, last = (jnp.clip(x, 0, size - 1) for x in (start, end - (1 << level)))
    return _Windows(level, (first, last))


def _look_up(table, image_index, rows, cols):
    _, col_levels, images, height, width, channels = table[0].shape
    table = [x.reshape(-1, channels) for x in table]
    level = rows.level[:, :, None] * col_levels + cols.level[:, None, :]
    image = level * images + image_index[:, None, None]
    four = []
    for row, col in itertools.product(rows.starts, cols.starts):
        index = (image * height + row[:, :, None]) * width + col[:, None, :]
        four.append([x.at[index].get(mode="promise_in_bounds") for x in table])
    return functools.reduce(_maximum, four)


def _maximum(one, other):
    return first_maximum(one, other) if len(one) == 2 else (lax.max(*one, *other),)
