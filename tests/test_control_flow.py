"""`jit`, `scan`, `cond` and `checkpoint` change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_roipool
import oracle
from harness import assert_same, distinct_features, random_rois, resolved

FEATURES = distinct_features((7, 9, 2))
STEPS = 4
ROIS = random_rois(STEPS * 3, 7, 9).reshape(STEPS, 3, 4)


@pytest.fixture(scope="module")
def pool():
    return functools.partial(jax_roipool.roi_pool, output_size=(2, 3))


def expected_pooled(rois, scale=1.0, mask=None):
    return oracle.roi_pool(FEATURES, rois, (2, 3), resolved("partition"), scale, mask)[0]


def expected_grad(weights):
    """The gradient of `sum(weights[i] * pooled of ROIS[i])`."""
    total = np.zeros(FEATURES.shape)
    for weight, rois in zip(weights, ROIS, strict=True):
        pooled, argmax = oracle.roi_pool(FEATURES, rois, (2, 3), resolved("partition"))
        cotangent = np.full(pooled.shape, weight)
        total += oracle.roi_pool_grad(cotangent, argmax, FEATURES.shape, rois)
    return total.astype(np.float32)


def test_jit_equals_eager(pool):
    expected = expected_pooled(ROIS[0])
    assert_same(pool(FEATURES, ROIS[0]), expected)
    assert_same(jax.jit(pool)(FEATURES, ROIS[0]), expected)


def test_numpy_arguments(pool):
    expected = expected_pooled(ROIS[0])
    assert_same(pool(np.asarray(FEATURES), np.asarray(ROIS[0])), expected)
    assert_same(
        pool(np.asarray(FEATURES), np.asarray(ROIS[0]), spatial_scale=np.float64(1)), expected
    )


def test_disable_jit(pool):
    with jax.disable_jit():
        assert_same(pool(FEATURES, ROIS[0]), expected_pooled(ROIS[0]))


def test_traced_scale_equals_python_scale(pool):
    expected = expected_pooled(ROIS[0], 0.7)
    assert_same(pool(FEATURES, ROIS[0], spatial_scale=0.7), expected)
    traced = jax.jit(lambda scale: pool(FEATURES, ROIS[0], spatial_scale=scale))
    for scale in (0.7, jnp.float32(0.7), np.float32(0.7)):
        assert_same(traced(scale), expected)
    assert_same(traced(2), expected_pooled(ROIS[0], 2))


def test_one_program_serves_every_roi_scale_and_mask(pool):
    @jax.jit
    def run(rois, scale, mask):
        return pool(FEATURES, rois, spatial_scale=scale, roi_mask=mask)

    for i in range(STEPS):
        mask = np.arange(3) != i
        assert_same(run(ROIS[i], 0.5 + i, mask), expected_pooled(ROIS[i], 0.5 + i, mask))
    assert run._cache_size() == 1


def test_constants_under_jit(pool):
    # Everything known at trace time: XLA may fold the arithmetic itself.
    for convention in jax_roipool.CONVENTIONS:
        expected, _ = oracle.roi_pool(FEATURES, ROIS[0], (2, 3), resolved(convention), 0.7)
        run = jax.jit(
            lambda convention=convention: pool(
                FEATURES, ROIS[0], spatial_scale=0.7, convention=convention
            )
        )
        assert_same(run(), expected)


def test_scan_over_roi_sets(pool):
    def step(total, rois):
        pooled = pool(FEATURES, rois)
        return total + jnp.sum(pooled), pooled

    total, pooled = jax.lax.scan(step, jnp.float32(0), ROIS)
    expected = np.stack([expected_pooled(rois) for rois in ROIS])
    assert_same(pooled, expected)
    assert total == expected.sum()


def test_lax_map_equals_vmap(pool):
    mapped = jax.lax.map(lambda rois: pool(FEATURES, rois), ROIS)
    assert_same(mapped, np.stack([expected_pooled(rois) for rois in ROIS]))


def test_cond_takes_one_branch(pool):
    @jax.jit
    def run(flag):
        return jax.lax.cond(flag, lambda: pool(FEATURES, ROIS[0]), lambda: pool(FEATURES, ROIS[1]))

    assert_same(run(True), expected_pooled(ROIS[0]))
    assert_same(run(False), expected_pooled(ROIS[1]))


def test_fori_loop_with_a_carried_roi(pool):
    def body(_, carry):
        rois, total = carry
        return rois + 1, total + pool(FEATURES, rois)

    run = jax.jit(lambda rois: jax.lax.fori_loop(0, 3, body, (rois, jnp.zeros((3, 2, 3, 2)))))
    _, total = run(ROIS[0])
    assert_same(total, sum(expected_pooled(ROIS[0] + i) for i in range(3)))


def test_gradient_through_scan(pool):
    weights = jnp.arange(1.0, 1 + STEPS)

    def loss(features):
        def step(total, inputs):
            rois, weight = inputs
            return total + weight * jnp.sum(pool(features, rois)), None

        return jax.lax.scan(step, jnp.float32(0), (ROIS, weights))[0]

    assert_same(jax.jit(jax.grad(loss))(FEATURES), expected_grad(weights))


def test_gradient_through_checkpoint(pool):
    @jax.checkpoint
    def block(features):
        return jnp.sum(pool(features, ROIS[0]))

    grad = jax.jit(jax.grad(lambda features: 3 * block(features)))(FEATURES)
    assert_same(grad, expected_grad([3, 0, 0, 0]))


def test_gradient_through_checkpointed_scan(pool):
    def loss(features):
        @jax.checkpoint
        def step(total, rois):
            return total + jnp.sum(pool(features, rois)), None

        return jax.lax.scan(step, jnp.float32(0), ROIS)[0]

    assert_same(jax.jit(jax.grad(loss))(FEATURES), expected_grad([1] * STEPS))
