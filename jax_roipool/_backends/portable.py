"""What the portable backends share: pooling by keys, and RoIs a chunk at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_roipool._backends.keys import from_key, to_key

INDEX_LIMIT = 2**31
"""What an int32 index cannot reach."""


def pool_by_keys(
    pool: Callable[[jax.Array], Sequence[jax.Array]],
    features: jax.Array,
    rectangles: Sequence[jax.Array],
    *,
    argmax_dtype,
    empty_value: float,
) -> list[jax.Array]:
    """`rectangle_max` of a portable backend, by what it does with keys.

    `pool(keys)`, of keys `[G, n, H, W, C]`, gives maxima `[G, K, P, Q, C]` and after them, if they
    are asked for, argmaxes. What it gives for a rectangle without cells, or an image that is not
    there, means nothing.
    """
    image_index, row_start, row_end, col_start, col_end = rectangles
    images, channels = features.shape[1], features.shape[4]
    shape = (*row_start.shape, col_start.shape[2], channels)
    if 0 in features.shape or 0 in shape:
        pooled = jnp.zeros(shape, features.dtype)
        return [pooled, jnp.full(shape, -1, argmax_dtype)] if argmax_dtype else [pooled]

    results = pool(to_key(features))
    pooled = from_key(results[0], features.dtype)
    no_cells = (row_end <= row_start)[..., :, None] | (col_end <= col_start)[..., None, :]
    no_image = (image_index < 0) | (image_index >= images)
    no_cells, no_image = no_cells[..., None], no_image[..., None, None, None]
    empty = _lowest(features.dtype) if empty_value < 0 else 0
    pooled = jnp.where(no_image, 0, jnp.where(no_cells, empty, pooled)).astype(features.dtype)
    if argmax_dtype is None:
        return [pooled]
    return [pooled, jnp.where(no_image | no_cells, -1, results[1]).astype(argmax_dtype)]


def _lowest(dtype):
    return -jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min


def nothing(keys_and_index: Sequence[jax.Array]) -> list[np.ndarray]:
    """A key, and an index if there is one, that no cell loses to."""
    values = np.iinfo(keys_and_index[0].dtype).min, np.iinfo(keys_and_index[-1].dtype).max
    return [np.array(v, x.dtype) for v, x in zip(values, keys_and_index, strict=False)]


def first_maximum(one, other):
    """Of two pairs of key and index the one that has the larger key, or else the smaller index."""
    (key, index), (other_key, other_index) = one, other
    other_wins = (other_key > key) | ((other_key == key) & (other_index < index))
    return lax.select(other_wins, other_key, key), lax.select(other_wins, other_index, index)


def pool_in_chunks(
    pool_roi: Callable,
    features: jax.Array,
    rectangles: Sequence[jax.Array],
    chunk: int,
    *,
    argmax_dtype,
    empty_value: float,
) -> list[jax.Array]:
    """`rectangle_max` of a portable backend, by what it does for one RoI.

    `pool_roi(keys, *rectangle)` gives maxima, and argmaxes if asked for, `[P, Q, C]` of one RoI in
    keys `[n, W, H, C]`.
    """
    results_wanted = 2 if argmax_dtype else 1  # what is not wanted, XLA does not compute

    def pool(keys):
        keys = jnp.moveaxis(keys, 3, 2)  # columns lead: the first pass runs over them
        return map_in_chunks(
            lambda rectangles: jax.vmap(pool_roi)(keys, *rectangles)[:results_wanted],
            rectangles,
            chunk,
        )

    return pool_by_keys(
        pool, features, rectangles, argmax_dtype=argmax_dtype, empty_value=empty_value
    )


def map_in_chunks(function, operands, chunk):
    """`function`, over RoI after RoI of all groups, a chunk at a time; `[G, K, ...]` again."""
    rois = operands[0].shape[1]
    results = lax.map(jax.vmap(function), to_chunks(operands, chunk))
    results = [jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])[:rois] for x in results]
    return [jnp.moveaxis(x, 0, 1) for x in results]


def to_chunks(operands, chunk):
    """`[steps, RoIs a step, G, ...]` of each `[G, K, ...]`, filled up with zeros at the end.

    Neighbours go to different steps, so that RoIs which are spread over devices stay there.
    """
    rois = operands[0].shape[1]
    steps = math.ceil(rois / chunk)
    # Better a few steps more than RoIs that are not there.
    steps = next((s for s in range(steps, 2 * steps) if rois % s == 0), steps)
    chunk = math.ceil(rois / steps)

    def to_steps(x):
        x = jnp.pad(x, [(0, 0), (0, steps * chunk - rois)] + [(0, 0)] * (x.ndim - 2))
        x = jnp.moveaxis(x, 1, 0).reshape(chunk, steps, x.shape[0], *x.shape[2:])
        return jnp.swapaxes(x, 0, 1)

    return tuple(map(to_steps, operands))


def image_of(keys, image_index):
    """The image of one RoI, or any if it has none."""
    images = keys.shape[0]
    return keys[0] if images == 1 else keys[jnp.clip(image_index, 0, images - 1)]
