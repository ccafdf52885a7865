"""Integers in the order of the features, so that every platform's integer maximum agrees.

Not one float is compared: a platform may take a subnormal for zero.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def to_key(features: jax.Array) -> jax.Array:
    """Integers in the order of the features: all NaNs equal and largest, zeros equal.

    No float becomes the smallest integer.
    """
    dtype = features.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        return features
    integer = _integer_like(dtype)
    bits = lax.bitcast_convert_type(features, integer)
    magnitude = bits & jnp.iinfo(integer).max
    keys = jnp.where(bits < 0, -magnitude, magnitude)
    return jnp.where(magnitude > _bits_of(np.inf, dtype), _bits_of(np.nan, dtype), keys)


def from_key(keys: jax.Array, dtype: np.dtype) -> jax.Array:
    """The features again, with one NaN for all and no negative zero."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return keys
    sign = jnp.iinfo(keys.dtype).min
    return lax.bitcast_convert_type(jnp.where(keys < 0, -keys | sign, keys), dtype)


def _integer_like(dtype):
    return {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[dtype.itemsize]


def _bits_of(value, dtype):
    return abs(np.array(value, dtype)).view(_integer_like(dtype))
