"""A portable backend: a loop over blocks of cells, that takes a block of every bin at each step.

A maximum may count a cell twice. So bins of all sizes can take equally many steps: where a block
reaches out of its bin, the bin's last rows and columns are read again. It takes no masks, no
scatter and no copy of a map for each RoI.

The argmax is the smallest index of all cells that have the maximum, in whatever order they are
read: a second loop finds it. On a CPU that is twice as fast as one loop for both, in which what is
kept of a cell depends on a comparison.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_roipool._backends.rectangle_max import indexing
from jax_roipool._backends.rectangle_max.portable import (
    first_maximum,
    nothing,
    pool_by_keys,
    split_edges,
)
from jax_roipool._manual_axes import vary_with

CPU_BLOCK = 2
"""Rows and columns of a block. Measured on two CPU cores: 1x1 is slower, and 4x4 no faster."""

BLOCK = WINDOW = 4
"""Elsewhere a step costs launches: blocks are larger, of windows of cells where those fit the bin.

Counted for a map of 200x336 cells and 1,024 RoIs of 7x7 bins: 6 steps, or 66 without windows.
"""

gather_at_argmax = indexing.gather_at_argmax
scatter_at_argmax = indexing.scatter_at_argmax


def rectangle_max(features, edges, *, output_size, argmax_dtype, empty_value):
    """See `jax_roipool._backends.rectangle_max`."""
    options = {"output_size": output_size, "argmax_dtype": argmax_dtype}

    def pool(keys):
        image = jnp.clip(edges[:, :, 0], 0, keys.shape[1] - 1)
        one_by_one = functools.partial(_pool_one_by_one, **options)
        at_once = functools.partial(_pool_at_once, **options)
        return lax.platform_dependent(keys, image, edges, cpu=one_by_one, default=at_once)

    return pool_by_keys(pool, features, edges, empty_value=empty_value, **options)


def _pool_one_by_one(keys, image, edges, **options):
    """RoI after RoI: each takes its own number of steps, and what it pools to stays in a cache."""
    groups, images, *map_shape = keys.shape
    keys = keys.reshape(1, groups * images, *map_shape)
    image += images * lax.broadcasted_iota(jnp.int32, image.shape, 0)
    rois = (image.reshape(-1, 1, 1), edges.reshape(-1, 1, 1, edges.shape[2]))
    results = lax.map(lambda roi: _pool([keys], *roi, block=CPU_BLOCK, window=1, **options), rois)
    return [x.reshape(*edges.shape[:2], *x.shape[3:]) for x in results]


def _pool_at_once(keys, image, edges, *, output_size, argmax_dtype):
    """All RoIs in one loop, which reads windows as well: they follow the images."""
    tables = [keys]
    if argmax_dtype:
        _, _, height, width, _ = keys.shape
        cells = lax.iota(argmax_dtype, height * width).reshape(height, width, 1)
        tables.append(vary_with(jnp.broadcast_to(cells, keys.shape), keys))
    tables = [jnp.concatenate(x, axis=1) for x in zip(tables, _windows(tables), strict=True)]
    options = {"output_size": output_size, "argmax_dtype": argmax_dtype}
    return _pool(tables, image, edges, block=BLOCK, window=WINDOW, **options)


def _windows(tables):
    """The maximum over the window that starts at each cell, and the first cell that has it."""
    size, inside = (1, 1, WINDOW, WINDOW, 1), (0, 0)
    padding = (inside, inside, (0, WINDOW - 1), (0, WINDOW - 1), inside)
    larger = first_maximum if len(tables) == 2 else lambda x, y: (lax.max(*x, *y),)
    return lax.reduce_window(tuple(tables), tuple(nothing(tables)), larger, size, (1,) * 5, padding)


def _pool(tables, image, edges, *, block, window, output_size, argmax_dtype):
    """Maxima, and argmaxes if asked for, `[G, K, P, Q, C]`.

    `tables` are keys and, if there are windows, the cells that these are from: `[G, n, H, W, C]`,
    or, with windows, `[G, 2n, H, W, C]`.
    """
    keys, width = tables[0], tables[0].shape[3]
    _, *bounds = split_edges(edges, output_size)
    row_start, row_end = (x[:, :, :, None] for x in bounds[:2])
    col_start, col_end = (x[:, :, None, :] for x in bounds[2:])
    rows, cols = row_end - row_start, col_end - col_start
    image, stride = image[:, :, None, None], 1
    if window > 1:
        fits = (rows >= window) & (cols >= window)
        image = jnp.where(fits, image + keys.shape[1] // 2, image)
        stride = jnp.where(fits, window, 1)

    def blocks_along(cells):
        """How many the longest bin of each RoI takes, and at least 1."""
        longest = (-(-cells // (stride * block))).max((2, 3), keepdims=True)
        return jnp.maximum(longest, 1)

    down, across = blocks_along(rows), blocks_along(cols)

    def fold(function, tables, initial):
        """What `function` makes of its last result, a key and its cell, over all that are read."""

        def step(i, result):
            row = row_start + i // across * (block * stride)
            col = col_start + i % across * (block * stride)
            rows = [jnp.minimum(row + j * stride, row_end - stride) for j in range(block)]
            cols = [jnp.minimum(col + j * stride, col_end - stride) for j in range(block)]
            for row, col in itertools.product(rows, cols):
                key, *cell = (_read(table, image, row, col) for table in tables)
                result = function(result, key, cell[0] if cell else (row * width + col)[..., None])
            return result

        initial = jnp.full((*edges.shape[:2], *output_size, keys.shape[4]), initial)
        return lax.fori_loop(0, (down * across).max(), step, vary_with(initial, keys, edges))

    smallest, _ = nothing([keys, keys])
    maximum = fold(lambda before, key, _: jnp.maximum(before, key), tables[:1], smallest)
    if not argmax_dtype:
        return [maximum]

    def first(before, key, cell):
        return jnp.where(key == maximum, jnp.minimum(before, cell.astype(before.dtype)), before)

    # Not of a narrower dtype: a choice by a comparison of wider keys is slow on a CPU.
    largest = np.array(np.iinfo(np.int32).max, np.int32)
    return [maximum, fold(first, tables, largest).astype(argmax_dtype)]


@jax.jit  # is traced once for all reads
@jax.vmap
def _read(table, *index):
    """The channels there, `[G, K, P, Q, C]`; an index of a bin without cells may be outside."""
    index = jnp.broadcast_arrays(*index)
    return table.at[tuple(index)].get(mode="clip", wrap_negative_indices=False)
