"""The type that backends sum in."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sum_dtype(x: jax.Array) -> jax.typing.DTypeLike:
    """For sums of such elements: float32 at least."""
    return x.dtype if x.dtype.itemsize > 4 else jnp.float32
