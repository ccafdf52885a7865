"""JAX's strict modes, which users turn on to find mistakes of their own, find none in here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_roipool
import oracle
from harness import assert_same, distinct_features, random_rois, resolved, whole_cotangent

FEATURES = distinct_features((2, 6, 7, 2), dtype=jnp.bfloat16)
ROIS = random_rois(5, 6, 7, images=2)
MASK = jnp.array([True, True, False, True, True])
COTANGENT = whole_cotangent((5, 2, 3, 2), dtype=jnp.bfloat16)
MODES = {
    "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "debug nans": lambda: jax.debug_nans(True),
    "debug infs": lambda: jax.debug_infs(True),
    "leaks": jax.checking_leaks,
}


@pytest.mark.parametrize("convention", ("partition", "torchvision"))
@pytest.mark.parametrize("mode", MODES)
def test_pooling_and_its_derivatives(mode, convention):
    def pool(features, scale):
        return jax_roipool.roi_pool_with_argmax(
            features,
            ROIS,
            (2, 3),
            spatial_scale=scale,
            roi_mask=MASK,
            convention=convention,
        )

    def loss(features):
        pooled = jax_roipool.roi_pool(
            features,
            ROIS,
            (2, 3),
            roi_mask=MASK,
            convention=convention,
        )
        return jnp.sum(pooled * COTANGENT, dtype=jnp.float32)

    with MODES[mode]():
        pooled, pullback, argmax = jax.vjp(lambda x: pool(x, 1.0), FEATURES, has_aux=True)
        (gradient,) = pullback(COTANGENT)
        users_gradient = jax.jit(jax.grad(loss))(FEATURES)  # keeps an argmax of int16
        second = jax.linear_transpose(pullback, COTANGENT)((FEATURES,))[0]
        scales = jnp.array([1.0, 0.5])
        mapped, _ = jax.vmap(pool, (None, 0))(FEATURES, scales)

    want, want_argmax = oracle.roi_pool(FEATURES, ROIS, (2, 3), resolved(convention), roi_mask=MASK)
    assert_same(pooled, want)
    assert_same(mapped[0], want)
    assert_same(second, want * (want_argmax >= 0))
    assert_same(argmax, want_argmax)
    want_gradient = oracle.roi_pool_grad(COTANGENT, want_argmax, FEATURES.shape, ROIS)
    assert_same(gradient, want_gradient.astype(np.dtype(jnp.bfloat16)))
    assert_same(users_gradient, want_gradient.astype(np.dtype(jnp.bfloat16)))


@pytest.mark.parametrize("convention", ("partition", "torchvision"))
@pytest.mark.parametrize("mode", ("debug nans", "debug infs"))
def test_no_step_on_the_way_is_infinite_or_not_a_number(mode, convention):
    rois = jnp.stack([ROIS, ROIS])

    def step(total, rois):
        return total + jax_roipool.roi_pool(
            FEATURES, rois, (2, 3), convention=convention
        ).sum(), None

    with MODES[mode]():
        with jax.disable_jit():
            jax_roipool.roi_pool(FEATURES, ROIS, (2, 3), convention=convention)
        jax.grad(lambda x: jax.lax.scan(step, x, rois)[0])(jnp.bfloat16(0))
