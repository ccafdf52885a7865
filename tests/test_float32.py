"""Arithmetic that no compiler may shorten, against NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from harness import assert_same
from jax_roipool._float32 import float32_product, float32_quotient

RNG = np.random.default_rng(0)
WHOLE = np.arange(8192, dtype=np.float32)
WIDE = (RNG.normal(size=8192) * 2.0 ** RNG.integers(-60, 60, 8192)).astype(np.float32)
NEAR_WHOLE = np.nextafter(WHOLE, np.float32(np.inf))
SPECIAL = np.float32([0, -0.0, 1e-38, -1e-45, 2.0**30, -(2.0**30), 2.0**90])


def divisors(like):
    return RNG.integers(1, 4097, like.shape).astype(np.float32)


@jax.jit
def quotient(dividend, divisor):
    return float32_quotient(dividend, divisor)


def test_the_quotient_is_the_nearest_float():
    for dividend in (WHOLE, WIDE, -WIDE, NEAR_WHOLE):
        for _ in range(20):
            divisor = divisors(dividend)
            assert_same(quotient(dividend, divisor), dividend / divisor)


@pytest.mark.parametrize("divisor", (1, 3, 7, 4096))
def test_so_is_that_by_a_constant(divisor):
    divisor = np.float32(divisor)
    divide = jax.jit(lambda x: float32_quotient(x, divisor))
    for dividend in (WHOLE, WIDE, NEAR_WHOLE):
        assert_same(divide(dividend), dividend / divisor)


def test_nothing_is_not_a_number():
    for divisor in (1, 7, 4096):
        wanted = SPECIAL / np.float32(divisor)
        got = np.array(quotient(SPECIAL, np.full_like(SPECIAL, divisor)))
        wanted[np.abs(wanted) < np.finfo(np.float32).tiny] = 0  # XLA takes subnormals for zeros
        if jax.default_backend() == "gpu":  # but not on a GPU
            got[np.abs(got) < np.finfo(np.float32).tiny] = 0
        np.testing.assert_allclose(got, wanted)


def test_the_quotient_has_the_derivative_of_one():
    value, tangent = jax.jvp(lambda x: float32_quotient(x, np.float32(7)), (3.0,), (2.0,))
    assert (value, tangent) == (np.float32(3) / np.float32(7), np.float32(2) / np.float32(7))
    assert jax.grad(lambda x: float32_quotient(x, np.float32(4)))(3.0) == 0.25


def test_a_product_is_rounded_before_it_is_added_to_something():
    x, y = (np.float32(RNG.normal(size=4096)) for _ in range(2))
    addend = -(x * y)
    fused = np.float32(x.astype(float) * y + addend)
    assert (fused != x * y + addend).mean() > 0.5  # a fused sum would show
    rounded = jax.jit(lambda x, y, z: float32_product(x, y) + z)
    assert_same(rounded(x, y, addend), jnp.asarray(x * y + addend))
