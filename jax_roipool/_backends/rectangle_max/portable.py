"""What the portable backends share: pooling by keys, and RoIs a chunk at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_roipool._backends.chunks import map_in_chunks
from jax_roipool._backends.rectangle_max.ordered import from_ordered, lowest, to_ordered

INDEX_LIMIT = 2**31
"""What an int32 index cannot reach."""


def split_edges(edges: jax.Array, output_size: tuple[int, int]) -> tuple[jax.Array, ...]:
    """Image index, first row, row after the last, first column, column after the last.

    Of edges `[..., 1 + 2P + 2Q]`: `[...]`, twice `[..., P]` and twice `[..., Q]`.
    """
    P, Q = output_size
    axis = edges.ndim - 1
    bounds = itertools.accumulate((1, P, P, Q, Q))
    return (
        lax.index_in_dim(edges, 0, axis, keepdims=False),
        *(lax.slice_in_dim(edges, *pair, axis=axis) for pair in itertools.pairwise(bounds)),
    )


def has_image(image_index: jax.Array, images: int) -> jax.Array:
    """Whether there is an image of that index."""
    return (image_index >= 0) & (image_index < images)


def pool_by_keys(
    pool: Callable[[jax.Array], Sequence[jax.Array]],
    features: jax.Array,
    edges: jax.Array,
    *,
    output_size: tuple[int, int],
    argmax_dtype,
    empty_value: float,
) -> list[jax.Array]:
    """`rectangle_max` of a portable backend, by what it does with keys.

    `pool(keys)`, of keys `[G, n, H, W, C]`, gives maxima `[G, K, P, Q, C]` and after them, if they
    are asked for, argmaxes. What it gives for a rectangle without cells, or an image that is not
    there, means nothing.
    """
    dtype, images = features.dtype, features.shape[1]
    shape = (*edges.shape[:2], *output_size, features.shape[4])
    if 0 in features.shape or 0 in shape:
        pooled = jnp.zeros(shape, dtype)
        return [pooled, jnp.full(shape, -1, argmax_dtype)] if argmax_dtype else [pooled]

    keys, *argmax = pool(to_ordered(features))
    image_index, row_start, row_end, col_start, col_end = split_edges(edges, output_size)
    no_cells = (row_end <= row_start)[:, :, :, None] | (col_end <= col_start)[:, :, None, :]
    no_cells, no_image = (
        no_cells[..., None],
        ~has_image(image_index, images)[:, :, None, None, None],
    )
    empty = lowest(dtype) if empty_value < 0 else 0
    keys = jnp.where(no_image, 0, jnp.where(no_cells, empty, keys))
    pooled = from_ordered(keys, dtype)
    if argmax_dtype is None:
        return [pooled]
    return [pooled, jnp.where(no_image | no_cells, -1, argmax[0]).astype(argmax_dtype)]


def nothing(keys_and_index: Sequence[jax.Array]) -> list[np.ndarray]:
    """A key, and an index if there is one, that no cell loses to."""
    values = np.iinfo(keys_and_index[0].dtype).min, np.iinfo(keys_and_index[-1].dtype).max
    return [np.array(v, x.dtype) for v, x in zip(values, keys_and_index, strict=False)]


def first_maximum(pair, other):
    """Of two pairs of key and index the one that has the larger key, or else the smaller index."""
    (key, index), (other_key, other_index) = pair, other
    other_wins = (other_key > key) | ((other_key == key) & (other_index < index))
    return lax.select(other_wins, other_key, key), lax.select(other_wins, other_index, index)


def pool_in_chunks(
    pool_roi: Callable[..., Sequence[jax.Array]],
    features: jax.Array,
    edges: jax.Array,
    chunk: int,
    *,
    output_size: tuple[int, int],
    argmax_dtype,
    empty_value: float,
) -> list[jax.Array]:
    """`rectangle_max` of a portable backend, by what it does for one RoI.

    `pool_roi(keys, image_index, row_start, row_end, col_start, col_end)` gives maxima, and argmaxes
    if asked for, `[P, Q, C]` of one RoI in keys `[n, W, H, C]`. `chunk` RoIs are taken at a time.
    """
    num_results = 2 if argmax_dtype else 1  # what is not wanted, XLA does not compute

    def pool(keys):
        keys = jnp.moveaxis(keys, 3, 2)  # columns lead: the first pass runs over them

        def pool_groups(edges):
            rectangles = split_edges(edges, output_size)
            return jax.vmap(pool_roi)(keys, *rectangles)[:num_results]

        return map_in_chunks(pool_groups, (edges,), chunk)

    return pool_by_keys(
        pool,
        features,
        edges,
        output_size=output_size,
        argmax_dtype=argmax_dtype,
        empty_value=empty_value,
    )


def image_of(keys: jax.Array, image_index: jax.Array) -> jax.Array:
    """The image of one RoI, or any if it has none."""
    images = keys.shape[0]
    return keys[0] if images == 1 else keys[jnp.clip(image_index, 0, images - 1)]
