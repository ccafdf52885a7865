"""RoIs a chunk at a time, for portable backends that would need too much memory for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax


def map_in_chunks(
    function: Callable[..., Sequence[jax.Array]], operands: Sequence[jax.Array], chunk: int
) -> Sequence[jax.Array]:
    """`function`, of `[G, ...]` to such, over the RoIs of operands `[G, K, ...]`, by chunks."""
    return map_chunks(jax.vmap(function), operands, chunk)


def map_chunks(function: Callable, operands: Sequence[jax.Array], chunk: int):
    """`function`, of `[RoIs, G, ...]` to such, over the RoIs of operands `[G, K, ...]`, by chunks.

    What it gives, an array or several, comes as `[G, K, ...]`.
    """
    num_rois = operands[0].shape[1]
    results = lax.map(lambda chunk: function(*chunk), to_chunks(operands, chunk))

    def of_all(x):
        x = jnp.swapaxes(x, 0, 1)
        x = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
        return jnp.moveaxis(x[:num_rois], 0, 1)

    return jax.tree.map(of_all, results)


def to_chunks(operands: Sequence[jax.Array], chunk: int) -> tuple[jax.Array, ...]:
    """`[steps, RoIs a step, G, ...]` of each `[G, K, ...]`, filled up with zeros at the end.

    Neighbours go to different steps, so that RoIs which are spread over devices stay there.
    """
    num_rois = operands[0].shape[1]
    steps = math.ceil(num_rois / chunk)
    # Better a few steps more than RoIs that are not there.
    steps = next((s for s in range(steps, 2 * steps) if num_rois % s == 0), steps)
    chunk = math.ceil(num_rois / steps)

    def to_steps(x):
        x = jnp.pad(x, [(0, 0), (0, steps * chunk - num_rois)] + [(0, 0)] * (x.ndim - 2))
        x = jnp.moveaxis(x, 1, 0).reshape(chunk, steps, x.shape[0], *x.shape[2:])
        return jnp.swapaxes(x, 0, 1)

    return tuple(map(to_steps, operands))
