"""Agreement of arrays on the mesh axes that they vary over inside `jax.shard_map`."""

from __future__ import annotations

import jax
from jax import lax


def vary_with(x: jax.Array, other: jax.Array) -> jax.Array:
    """`x`, varying over every mesh axis that `other` varies over.

    Outside of `shard_map` this is `x`. Inside, the gradient of `x` is then summed over the axes
    that were added, as it has to be where only `other` is sharded.
    """
    axes = tuple(_varying(other) - _varying(x))
    if not axes:
        return x
    if hasattr(lax, "pcast"):
        return lax.pcast(x, axes, to="varying")
    return lax.pvary(x, axes)  # pyright: ignore[reportAttributeAccessIssue]  # before JAX 0.8


def _varying(x: jax.Array) -> frozenset:
    array_type = jax.typeof(x)
    if hasattr(array_type, "mat"):
        return array_type.mat.varying
    return array_type.vma  # before JAX 0.10
