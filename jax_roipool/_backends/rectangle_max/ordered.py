"""Integers in the order of the features, so that every platform's integer maximum agrees.

Not one float is compared or converted: a platform may take a subnormal for zero.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def to_ordered(features: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """Integers in the order of the features: all NaNs equal and largest, zeros equal.

    No float becomes the smallest integer. The integers are as wide as the features, unless another
    dtype says that those of floats are to be wider.
    """
    if not jnp.issubdtype(features.dtype, jnp.floating):
        return features
    infinity, nan = (_bits_of(value, features.dtype) for value in (np.inf, np.nan))
    bits = to_bits(features, dtype)
    magnitude = bits & jnp.iinfo(_integer_like(features.dtype)).max
    keys = jnp.where(bits < 0, -magnitude, magnitude)
    return jnp.where(magnitude > infinity, nan, keys)


def from_ordered(keys: jax.Array, dtype: np.dtype) -> jax.Array:
    """The features again, with one NaN for all and no negative zero.

    Of the smallest integer that the keys can hold: -0, which nothing else gives.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        return keys
    sign = jnp.iinfo(_integer_like(dtype)).min
    return from_bits(jnp.where(keys < 0, -keys | sign, keys), dtype)


def to_bits(features: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """The bits of floats, as integers that are negative where the sign is set; or the integers."""
    if not jnp.issubdtype(features.dtype, jnp.floating):
        return features.astype(dtype or features.dtype)
    integer = _integer_like(features.dtype)
    return lax.bitcast_convert_type(features, integer).astype(dtype or integer)


def from_bits(bits: jax.Array, dtype: np.dtype) -> jax.Array:
    """The floats, or integers, that `to_bits` was given."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return bits.astype(dtype)
    return lax.bitcast_convert_type(bits.astype(_integer_like(dtype)), dtype)


def lowest(dtype: np.dtype) -> int:
    """What `to_ordered` makes of -inf, or of the smallest integer."""
    if jnp.issubdtype(dtype, jnp.floating):
        return -_bits_of(np.inf, dtype)
    return int(jnp.iinfo(dtype).min)


def _integer_like(dtype):
    return {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[dtype.itemsize]


def _bits_of(value, dtype) -> int:
    return int(abs(np.array(value, dtype)).view(_integer_like(dtype)))
