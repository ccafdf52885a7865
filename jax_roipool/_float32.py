"""Arithmetic that is float32's everywhere, to the last bit.

XLA divides by multiplying with a rounded reciprocal, and lets a product and a sum round as one.
Where a bin's edge or a sampling point decides which cells are read, that is not good enough.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_FAR = np.float32(2.0**100)


def float32_product(x: jax.Array, y: jax.Array | np.ndarray) -> jax.Array:
    """`x * y`, rounded before anything is added to it, for products within +-2**100.

    A clip is the one thing that no compiler fuses a multiplication and an addition through.
    """
    return jnp.clip(x * y, -_FAR, _FAR)


@jax.custom_jvp
def float32_quotient(dividend: jax.Array, divisor: jax.Array | np.ndarray) -> jax.Array:
    """`dividend / divisor` rounded as IEEE 754 says, whatever the platform's division does.

    XLA multiplies by a rounded reciprocal instead, and GPUs and TPUs divide approximately. So the
    quotient's neighbours are compared by what each leaves of the dividend, which is exact: with
    the upper half of a neighbour's bits and the lower half apart, no product has over 24 bits.

    Args:
      dividend: float32, within +-2**100. A quotient under 2**-100 can be off by a bit.
      divisor: float32, whole numbers from 1 to 4096; for larger ones a bit can differ. It is a
        constant to derivatives.
    """
    approximate = dividend / divisor
    bits = lax.bitcast_convert_type(approximate, jnp.int32)

    def neighbour(step):
        quotient = lax.bitcast_convert_type(bits + step, jnp.float32)
        upper = lax.bitcast_convert_type((bits + step) & ~0xFFF, jnp.float32)
        return quotient, jnp.abs((dividend - upper * divisor) - (quotient - upper) * divisor)

    best, left_by_best = neighbour(-2)
    for step in range(-1, 3):
        quotient, left = neighbour(step)
        best = jnp.where(left < left_by_best, quotient, best)
        left_by_best = jnp.minimum(left, left_by_best)
    return jnp.where(jnp.abs(approximate) > 1 / _FAR, best, approximate)  # zero has no neighbours


@float32_quotient.defjvp
def _float32_quotient_jvp(primals, tangents):
    dividend, divisor = primals
    return float32_quotient(dividend, divisor), tangents[0] / divisor
