"""`forward_mode=True`: tangents as well as cotangents, and otherwise no difference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_roipool
import oracle
from harness import assert_same, distinct_features, random_rois, resolved, whole_cotangent

OUTPUT_SIZE = (2, 3)
FEATURES = distinct_features((2, 6, 7, 3))
TANGENT = whole_cotangent(FEATURES.shape, seed=1)
MASK = jnp.array([True, True, False, True, True])
ROIS = {
    "flat": random_rois(5, 6, 7, images=2),
    "per image": jnp.stack([random_rois(5, 6, 7, seed) for seed in range(2)]),
}
LAYOUTS = pytest.mark.parametrize("layout", ROIS)


def pool(features, rois, forward_mode=True, with_argmax=False, **options):
    function = jax_roipool.roi_pool_with_argmax if with_argmax else jax_roipool.roi_pool
    return function(features, rois, OUTPUT_SIZE, forward_mode=forward_mode, **options)


@functools.cache
def expected(layout, convention="partition", masked=False):
    """What pools, the cells, and the tangent: that of each cell."""
    rois = ROIS[layout]
    roi_mask = jnp.broadcast_to(MASK, rois.shape[:-1]) if masked else None
    pooled, argmax = oracle.roi_pool(
        FEATURES, rois, OUTPUT_SIZE, resolved(convention), roi_mask=roi_mask
    )
    maps = np.asarray(TANGENT).reshape(2, -1, 3)
    image = np.asarray(rois[:, 0], int) if layout == "flat" else np.arange(2)[:, None]
    image = image[..., None, None, None]
    return pooled, argmax, np.where(argmax < 0, 0, maps[image, argmax, np.arange(3)])


@LAYOUTS
@pytest.mark.parametrize("with_argmax", (False, True))
@pytest.mark.parametrize("convention", ("partition", "chainer"))
def test_jvp(layout, convention, with_argmax):
    rois, (pooled, argmax, tangent) = ROIS[layout], expected(layout, convention)

    def f(x):
        return pool(x, rois, with_argmax=with_argmax, convention=convention)

    primal, dot = jax.jit(lambda x, t: jax.jvp(f, (x,), (t,)))(FEATURES, TANGENT)
    if with_argmax:
        assert_same(primal[1], argmax)
        assert dot[1].dtype == jax.dtypes.float0
        primal, dot = primal[0], dot[0]
    assert_same(primal, pooled)
    assert_same(dot, tangent.astype(np.float32))


@LAYOUTS
def test_linearize_and_the_mask(layout):
    rois, (pooled, _, tangent) = ROIS[layout], expected(layout, masked=True)
    mask = jnp.broadcast_to(MASK, rois.shape[:-1])
    primal, linear = jax.linearize(lambda x: pool(x, rois, roi_mask=mask), FEATURES)
    assert_same(primal, pooled)
    assert_same(linear(TANGENT), tangent.astype(np.float32))
    assert_same(jax.vmap(linear)(jnp.stack([TANGENT, -TANGENT]))[1], -tangent.astype(np.float32))


def test_jacfwd_is_jacrev():
    features, rois = FEATURES[0, :, :, :1], ROIS["per image"][0]
    forward = jax.jit(jax.jacfwd(lambda x: pool(x, rois)))(features)
    reverse = jax.jit(jax.jacrev(lambda x: pool(x, rois, forward_mode=False)))(features)
    assert_same(forward, np.asarray(reverse))
    assert np.any(forward)


@LAYOUTS
def test_the_gradient_is_the_same_bits(layout):
    rois = ROIS[layout]
    cotangent = jax.random.normal(jax.random.key(0), (*rois.shape[:-1], *OUTPUT_SIZE, 3))

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(features, forward_mode):
        return jax.vjp(lambda x: pool(x, rois, forward_mode), features)[1](cotangent)[0]

    assert_same(gradient(FEATURES, True), np.asarray(gradient(FEATURES, False)))


def test_a_vmap_of_sets_of_rois_keeps_one_gradient_map():
    """By the shapes in the program: with a custom VJP there is a map for each set."""
    sets = jnp.stack([ROIS["flat"], ROIS["flat"][::-1], ROIS["flat"]])

    def loss(features, forward_mode):
        mapped = jax.vmap(lambda rois: pool(features, rois, forward_mode))(sets)
        return (mapped**2).sum()

    gradients, maps = [], []
    for forward_mode in (False, True):
        program = jax.jit(jax.grad(loss), static_argnums=1)
        gradients.append(np.asarray(program(FEATURES, forward_mode)))
        maps.append("3x2x6x7x3xf32" in program.lower(FEATURES, forward_mode).as_text())
    np.testing.assert_array_equal(*gradients)
    assert maps == [True, False]


def test_tangents_under_scan_checkpoint_and_vmap():
    rois = ROIS["flat"]
    _, _, tangent = expected("flat")

    def f(x):
        def step(total, rois):
            return total + jax.checkpoint(pool)(x, rois), None

        return jax.lax.scan(step, jnp.zeros((5, *OUTPUT_SIZE, 3)), jnp.stack([rois, rois]))[0]

    def along(t):
        return jax.jvp(f, (FEATURES,), (t,))[1]

    dots = jax.jit(jax.vmap(along))(jnp.stack([TANGENT, 2 * TANGENT]))
    assert_same(dots[0], 2 * tangent.astype(np.float32))
    assert_same(dots[1], 4 * tangent.astype(np.float32))


def test_second_derivatives_either_way():
    rois, (pooled, _, tangent) = ROIS["flat"], expected("flat")

    def loss(x):
        return (pool(x, rois) ** 2).sum()

    def along(x):
        return jax.jvp(loss, (x,), (TANGENT,))[1]

    assert float(jax.jit(along)(FEATURES)) == (2 * pooled * tangent).sum()
    forward_over_reverse = jax.jit(lambda x: jax.jvp(jax.grad(loss), (x,), (TANGENT,))[1])
    np.testing.assert_array_equal(
        jax.jit(jax.grad(along))(FEATURES), forward_over_reverse(FEATURES)
    )


def test_by_default_there_is_no_forward_mode():
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: pool(x, ROIS["flat"], False), (FEATURES,), (TANGENT,))
