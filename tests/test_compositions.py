"""Transformations of transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_roipool
import oracle
from harness import assert_same, distinct_features, random_rois, resolved, whole_cotangent

HEIGHT, WIDTH, CHANNELS, COUNT, SETS = 5, 6, 2, 3, 3
OUTPUT_SIZE = (2, 2)
CONVENTION = "torchvision"
FEATURES = distinct_features((SETS, HEIGHT, WIDTH, CHANNELS))
ROIS = random_rois(SETS * COUNT, HEIGHT, WIDTH).reshape(SETS, COUNT, 4)
COTANGENTS = whole_cotangent((SETS, COUNT, *OUTPUT_SIZE, CHANNELS))


@pytest.fixture(scope="module")
def pool():
    return functools.partial(jax_roipool.roi_pool, output_size=OUTPUT_SIZE, convention=CONVENTION)


@pytest.fixture(scope="module")
def weighted(pool):
    """A scalar whose gradient is the pullback of the cotangent."""
    return lambda features, rois, cotangent: jnp.vdot(pool(features, rois), cotangent)


def expected_grad(features, rois, cotangent):
    _, argmax = oracle.roi_pool(features, rois, OUTPUT_SIZE, resolved(CONVENTION))
    grad = oracle.roi_pool_grad(np.asarray(cotangent), argmax, features.shape, rois)
    return grad.astype(np.float32)


def test_vmap_of_grad(weighted):
    grads = jax.jit(jax.vmap(jax.grad(weighted)))(FEATURES, ROIS, COTANGENTS)
    expected = [expected_grad(*one) for one in zip(FEATURES, ROIS, COTANGENTS, strict=True)]
    assert_same(grads, np.stack(expected))


def test_vmap_of_grad_with_shared_features(weighted):
    grads = jax.vmap(jax.grad(weighted), (None, 0, 0))(FEATURES[0], ROIS, COTANGENTS)
    expected = [expected_grad(FEATURES[0], *one) for one in zip(ROIS, COTANGENTS, strict=True)]
    assert_same(grads, np.stack(expected))


def test_vmap_of_grad_with_shared_rois(weighted):
    grads = jax.vmap(jax.grad(weighted), (0, None, None))(FEATURES, ROIS[0], COTANGENTS[0])
    expected = [expected_grad(one, ROIS[0], COTANGENTS[0]) for one in FEATURES]
    assert_same(grads, np.stack(expected))


def test_vmap_of_pullback_over_cotangents_alone(pool):
    _, pullback = jax.vjp(lambda features: pool(features, ROIS[0]), FEATURES[0])
    (grads,) = jax.vmap(pullback)(COTANGENTS)
    expected = [expected_grad(FEATURES[0], ROIS[0], cotangent) for cotangent in COTANGENTS]
    assert_same(grads, np.stack(expected))


def test_grad_of_vmap(weighted):
    def total(features):
        return jnp.sum(jax.vmap(weighted)(features, ROIS, COTANGENTS))

    expected = [expected_grad(*one) for one in zip(FEATURES, ROIS, COTANGENTS, strict=True)]
    assert_same(jax.jit(jax.grad(total))(FEATURES), np.stack(expected))


def test_grad_of_vmap_with_shared_features_adds_up(weighted):
    def total(features):
        return jnp.sum(jax.vmap(weighted, (None, 0, 0))(features, ROIS, COTANGENTS))

    parts = [expected_grad(FEATURES[0], *one) for one in zip(ROIS, COTANGENTS, strict=True)]
    assert_same(jax.jit(jax.grad(total))(FEATURES[0]), sum(parts))


def test_vmap_of_grad_of_vmap(weighted):
    # Every feature map with every set of RoIs.
    def total(features):
        return jnp.sum(jax.vmap(weighted, (None, 0, 0))(features, ROIS, COTANGENTS))

    grads = jax.jit(jax.vmap(jax.grad(total)))(FEATURES)
    expected = [
        sum(expected_grad(one, *rest) for rest in zip(ROIS, COTANGENTS, strict=True))
        for one in FEATURES
    ]
    assert_same(grads, np.stack(expected))


def test_grad_of_vmap_over_cells_of_flat_rois(pool):
    # vmap over [R, 5] RoIs on a shared batch of images.
    rois = random_rois(SETS * COUNT, HEIGHT, WIDTH, images=SETS).reshape(SETS, COUNT, 5)

    def total(features):
        pooled = jax.vmap(pool, (None, 0))(features, rois)
        return jnp.vdot(pooled, COTANGENTS)

    expected = sum(expected_grad(FEATURES, *one) for one in zip(rois, COTANGENTS, strict=True))
    assert_same(jax.grad(total)(FEATURES), expected)


def test_jacrev_is_one_hot_at_the_argmax(pool):
    jacobian = jax.jit(jax.jacrev(lambda features: pool(features, ROIS[0])))(FEATURES[0])
    _, argmax = oracle.roi_pool(FEATURES[0], ROIS[0], OUTPUT_SIZE, resolved(CONVENTION))
    expected = np.zeros((*argmax.shape, HEIGHT * WIDTH, CHANNELS), np.float32)
    for index in np.ndindex(*argmax.shape):
        if argmax[index] >= 0:
            expected[(*index, argmax[index], index[-1])] = 1
    assert_same(jacobian, expected.reshape(*argmax.shape, HEIGHT, WIDTH, CHANNELS))


def test_vmap_of_jacrev(pool):
    jacobian = jax.vmap(jax.jacrev(pool))(FEATURES, ROIS)
    for i in range(SETS):
        assert_same(jacobian[i], jax.jacrev(pool)(FEATURES[i], ROIS[i]))
    assert np.any(jacobian)


def test_vmap_of_hessian_vector_product(pool):
    def loss(features, rois):
        return jnp.sum(pool(features, rois) ** 2)

    def product(features, rois, direction):
        def grad(features):
            return jax.grad(loss)(features, rois)

        return jax.jvp(grad, (features,), (direction,))[1]

    directions = whole_cotangent(FEATURES.shape)
    products = jax.jit(jax.vmap(product))(FEATURES, ROIS, directions)
    for i in range(SETS):
        _, argmax = oracle.roi_pool(FEATURES[i], ROIS[i], OUTPUT_SIZE, resolved(CONVENTION))
        cells = np.asarray(directions[i]).reshape(-1, CHANNELS)
        gathered = cells[argmax, np.arange(CHANNELS)]
        assert np.any(argmax >= 0)
        expected = expected_grad(FEATURES[i], ROIS[i], np.float32(2) * gathered)
        assert_same(products[i], expected)


def test_hessian_is_diagonal(pool):
    def loss(features):
        return jnp.sum(pool(features, ROIS[0]) ** 2)

    size = HEIGHT * WIDTH * CHANNELS
    hessian = jax.jacfwd(jax.jacrev(loss))(FEATURES[0]).reshape(size, size)
    # Twice the number of bins that a cell is the maximum of.
    ones = np.ones((COUNT, *OUTPUT_SIZE, CHANNELS), np.float32)
    expected = np.diag(2 * expected_grad(FEATURES[0], ROIS[0], ones).ravel())
    assert_same(hessian, expected)


def test_gradient_flows_on_through_a_layer_before_and_after(pool):
    kernel = jnp.asarray([[1.0, -2.0], [3.0, 1.0]])

    def loss(kernel):
        pooled = pool(FEATURES[0] @ kernel, ROIS[0])
        return jnp.vdot(pooled, COTANGENTS[0])

    mixed = FEATURES[0] @ kernel
    cells = expected_grad(mixed, ROIS[0], COTANGENTS[0])
    expected = np.einsum("hwi,hwo->io", FEATURES[0], cells)
    assert_same(jax.jit(jax.grad(loss))(kernel), expected)


def test_grad_of_pooled_with_argmax_as_auxiliary():
    def loss(features):
        pooled, argmax = jax_roipool.roi_pool_with_argmax(
            features, ROIS[0], OUTPUT_SIZE, convention=CONVENTION
        )
        return jnp.vdot(pooled, COTANGENTS[0]), argmax

    (_, argmax), grad = jax.value_and_grad(loss, has_aux=True)(FEATURES[0])
    _, expected = oracle.roi_pool(FEATURES[0], ROIS[0], OUTPUT_SIZE, resolved(CONVENTION))
    assert_same(argmax, expected)
    assert_same(grad, expected_grad(FEATURES[0], ROIS[0], COTANGENTS[0]))


def test_forward_mode_straight_through_is_refused(pool):
    # A documented limit of functions with a gradient rule of their own.
    assert np.any(pool(FEATURES[0], ROIS[0]))
    with pytest.raises(TypeError):
        jax.jvp(lambda features: pool(features, ROIS[0]), (FEATURES[0],), (FEATURES[0],))


def test_stop_gradient_and_perturbed_rois(pool):
    # RoIs that depend on the features, as a proposal network's do, add nothing to the gradient.
    def loss(features, shift):
        rois = ROIS[0] + shift * jnp.mean(features)
        return jnp.vdot(pool(features, rois), COTANGENTS[0])

    grad = jax.grad(loss)(FEATURES[0], 0.0)
    assert_same(grad, expected_grad(FEATURES[0], ROIS[0], COTANGENTS[0]))
    rois = ROIS[0] + 1e-3 * jnp.mean(FEATURES[0])
    grad = jax.grad(loss)(FEATURES[0], 1e-3)
    assert_same(grad, expected_grad(FEATURES[0], rois, COTANGENTS[0]))
