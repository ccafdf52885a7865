"""The gradient of the features: each bin's cotangent goes whole to its first maximum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jax_roipool
import oracle
from harness import (
    assert_same,
    distinct_features,
    pool,
    pool_and_grad,
    random_rois,
    resolved,
    whole_cotangent,
)


def grad_of(features, rois, cotangent, output_size, convention="partition"):
    features = jnp.asarray(features, jnp.float32)[..., None]
    cotangent = jnp.asarray(cotangent, jnp.float32)[..., None]
    run = pool_and_grad(output_size, convention)
    return run(features, jnp.asarray(rois, jnp.float32), cotangent)[2][..., 0]


def test_tie_goes_whole_to_the_first_maximum_in_row_major_order():
    # The later maximum lies further left: rows come first.
    features = [[0, 0, 7], [7, 7, 0], [7, 0, 0]]
    grad = grad_of(features, [[0, 0, 3, 3]], [[[5]]], (1, 1))
    assert grad.tolist() == [[0, 0, 5], [0, 0, 0], [0, 0, 0]]


def test_signed_zeros_tie():
    grad = grad_of([[-0.0, 0.0], [0.0, -0.0]], [[0, 0, 2, 2]], [[[5]]], (1, 1))
    assert grad.tolist() == [[5, 0], [0, 0]]
    grad = grad_of([[0.0, -0.0], [0.0, -0.0]], [[0, 0, 2, 2]], [[[5]]], (1, 1))
    assert grad.tolist() == [[5, 0], [0, 0]]


def test_first_nan_of_a_bin_takes_its_gradient():
    features = [[1, 9, 2], [np.inf, 3, np.nan], [np.nan, 5, 6]]
    grad = grad_of(features, [[0, 0, 3, 3]], [[[5]]], (1, 1))
    assert grad.tolist() == [[0, 0, 0], [0, 0, 5], [0, 0, 0]]


def test_constant_map_sends_each_bin_to_its_first_cell():
    grad = grad_of(np.ones((4, 4)), [[0, 0, 4, 4]], [[[1, 2], [3, 4]]], (2, 2))
    assert grad.tolist() == [[1, 0, 2, 0], [0, 0, 0, 0], [3, 0, 4, 0], [0, 0, 0, 0]]


def test_overlapping_bins_add_up():
    # Three cells in two bins of torchvision's: both hold the middle row and column.
    features = [[1, 2, 3], [4, 9, 5], [6, 7, 8]]
    cotangent = [[[1, 2], [3, 4]]]
    rois = [[0, 0, 2, 2]]
    grad = grad_of(features, rois, cotangent, (2, 2), "torchvision")
    assert grad.tolist() == [[0, 0, 0], [0, 10, 0], [0, 0, 0]]


def test_overlapping_rois_add_up():
    features = [[1, 2], [3, 4]]
    rois = [[0, 0, 2, 2], [1, 1, 2, 2], [0, 0, 2, 1], [0, 0, 2, 2]]
    cotangent = np.reshape([1, 2, 4, 8], (4, 1, 1))
    grad = grad_of(features, rois, cotangent, (1, 1))
    assert grad.tolist() == [[0, 4], [0, 11]]


def test_roi_smaller_than_its_bins_repeats_its_cells():
    grad = grad_of([[1, 2], [3, 4]], [[1, 0, 2, 1]], np.ones((1, 3, 3)), (3, 3))
    assert grad.tolist() == [[0, 9], [0, 0]]


@pytest.mark.parametrize("cells", (2**15, 2**15 + 1))
def test_the_last_cell_that_int16_has_an_index_for_and_the_next(cells):
    features = jnp.zeros((1, cells, 1)).at[0, -1].set(1)
    rois = jnp.asarray([[0, 0, cells, 1]], jnp.float32)
    gradient = jax.jit(jax.grad(lambda x: jax_roipool.roi_pool(x, rois, 1).sum()))(features)
    assert gradient[0, -1, 0] == 1
    assert gradient.sum() == 1


def test_channels_and_images_do_not_mix():
    features = distinct_features((3, 5, 6, 4))
    rois = jnp.asarray([[1, 0, 0, 6, 5]], jnp.float32)
    cotangent = whole_cotangent((1, 1, 1, 4))
    _, argmax, grad = pool_and_grad((1, 1), "partition")(features, rois, cotangent)
    assert len(set(argmax.ravel().tolist())) > 1
    expected = np.zeros(features.shape, np.float32)
    for channel, cell in enumerate(argmax.ravel().tolist()):
        expected[1, cell // 6, cell % 6, channel] = cotangent[0, 0, 0, channel]
    assert_same(grad, expected)


def test_gradient_agrees_with_finite_differences():
    # Values a whole unit apart: a small step changes no maximum.
    features = distinct_features((2, 7, 8, 2)) / 4
    rois = random_rois(5, 7, 8, images=2)

    def f(features):
        return jax_roipool.roi_pool(features, rois, (2, 3), convention="torchvision")

    assert np.count_nonzero(f(features)) > 40
    f = jax.jit(f)
    check_grads(f, (features,), order=2, modes=("rev",), eps=1e-2, atol=1e-2, rtol=1e-2)


def test_rois_scale_and_mask_get_zero_cotangents_of_their_own_type():
    features = distinct_features((6, 6, 2))
    mask = jnp.ones(3, bool)

    def f(features, rois, scale, mask):
        return jax_roipool.roi_pool(features, rois, 2, spatial_scale=scale, roi_mask=mask)

    for dtype in (jnp.float32, jnp.bfloat16):
        rois = random_rois(3, 6, 6).astype(dtype)
        pooled, pullback = jax.vjp(f, features, rois, jnp.float32(1), mask)
        features_bar, rois_bar, scale_bar, mask_bar = pullback(jnp.ones_like(pooled))
        assert np.any(features_bar)
        assert_same(rois_bar, np.zeros((3, 4), dtype))
        assert_same(scale_bar, np.float32(0))
        assert mask_bar.dtype == jax.dtypes.float0
        assert mask_bar.shape == (3,)


def test_integer_rois_get_float0():
    features = distinct_features((6, 6, 2))
    rois = jnp.asarray([[0, 0, 5, 5], [1, 2, 4, 6]], jnp.int32)

    def f(features, rois):
        return jax_roipool.roi_pool(features, rois, 2)

    pooled, pullback = jax.vjp(f, features, rois)
    features_bar, rois_bar = pullback(jnp.ones_like(pooled))
    assert np.any(features_bar)
    assert rois_bar.dtype == jax.dtypes.float0
    assert rois_bar.shape == rois.shape


def test_gradient_with_respect_to_the_rois_is_zero():
    features = distinct_features((6, 6, 2))
    rois = random_rois(3, 6, 6)

    def f(rois, features):
        pooled = jax_roipool.roi_pool(features, rois, 2)
        return jnp.sum(pooled**2)

    assert f(rois, features) > 0
    assert_same(jax.grad(f)(rois, features), np.zeros((3, 4), np.float32))


# Running sums of ones stop growing at 256 in bfloat16 and at 2048 in float16.
@pytest.mark.parametrize(
    ("dtype", "count"), ((jnp.bfloat16, 10), (jnp.float16, 60)), ids=("bfloat16", "float16")
)
def test_many_small_gradients_accumulate_in_float32(dtype, count):
    # Each RoI is 6 x 6 bins of the only cell with the maximum.
    features = jnp.asarray([[1, 2], [3, 4]], dtype)[..., None]
    rois = jnp.tile(jnp.asarray([[1, 1, 2, 2]], jnp.float32), (count, 1))
    cotangent = jnp.ones((count, 6, 6, 1), dtype)
    _, _, grad = pool_and_grad((6, 6), "partition")(features, rois, cotangent)
    assert_same(grad[..., 0], np.array([[0, 0], [0, 36 * count]], dtype))


def test_bins_of_one_roi_accumulate_in_float32():
    # 16 x 18 bins of the only cell.
    features = jnp.ones((1, 1, 1), jnp.bfloat16)
    rois = jnp.asarray([[0, 0, 1, 1]], jnp.float32)
    cotangent = jnp.ones((1, 16, 18, 1), jnp.bfloat16)
    _, _, grad = pool_and_grad((16, 18), "partition")(features, rois, cotangent)
    assert_same(grad, np.full((1, 1, 1), 288, jnp.bfloat16))


def test_float64_gradients_accumulate_in_float64(x64):
    features = jnp.ones((1, 1, 1), jnp.float64)
    rois = jnp.asarray([[0, 0, 1, 1]] * 2, jnp.float32)
    cotangent = jnp.asarray([1, 2.0**-40], jnp.float64).reshape(2, 1, 1, 1)
    _, _, grad = pool_and_grad((1, 1), "partition")(features, rois, cotangent)
    assert_same(grad, np.full((1, 1, 1), 1 + 2.0**-40))


@pytest.mark.parametrize("value", (np.nan, np.inf))
def test_cotangent_that_is_not_finite_stays_with_its_bin(value):
    features = distinct_features((4, 4, 1))
    rois = jnp.asarray([[0, 0, 2, 2], [2, 2, 4, 4]], jnp.float32)
    cotangent = jnp.asarray([value, 1], jnp.float32).reshape(2, 1, 1, 1)
    run = pool_and_grad((1, 1), "partition")
    _, argmax, grad = run(features, rois, cotangent)
    expected = np.zeros(16, np.float32)
    expected[argmax.ravel()] = value, 1
    assert_same(grad.ravel(), expected)


def cubes(rois):
    def f(features):
        pooled = jax_roipool.roi_pool(features, rois, (2, 3), convention="torchvision")
        return jnp.sum(pooled**3)

    return f


def second_derivative(features, rois, direction):
    """The Hessian-vector product of `cubes`: every bin adds `6 * pooled * direction[argmax]`."""
    pooled, argmax = oracle.roi_pool(features, rois, (2, 3), resolved("torchvision"))
    height, width, channels = features.shape
    expected = np.zeros((height * width, channels), np.float32)
    for index in np.ndindex(*argmax.shape):
        cell, channel = int(argmax[index]), index[-1]
        if cell >= 0:
            row, column = divmod(cell, width)
            expected[cell, channel] += 6 * pooled[index] * direction[row, column, channel]
    return expected.reshape(features.shape)


def test_grad_of_grad():
    features, direction = distinct_features((6, 7, 2)), whole_cotangent((6, 7, 2))
    rois = random_rois(4, 6, 7)
    f = cubes(rois)
    hvp = jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), direction))(features)
    expected = second_derivative(features, rois, direction)
    assert np.any(expected)
    np.testing.assert_allclose(hvp, expected, rtol=1e-6)


def test_forward_over_reverse_hessian_vector_product():
    features, direction = distinct_features((6, 7, 2)), whole_cotangent((6, 7, 2))
    rois = random_rois(4, 6, 7)
    f = cubes(rois)
    grad, hvp = jax.jvp(jax.grad(f), (features,), (direction,))
    np.testing.assert_allclose(grad, jax.grad(f)(features), rtol=1e-6)
    expected = second_derivative(features, rois, direction)
    assert np.any(expected)
    np.testing.assert_allclose(hvp, expected, rtol=1e-6)


def test_grad_of_grad_of_grad():
    features, rois = distinct_features((5, 5, 1)) / 4, random_rois(2, 5, 5)
    f = cubes(rois)
    total = np.asarray(pool((2, 3), "torchvision")(features, rois)[1] >= 0).sum()
    grad = jax.grad(f)
    once = jax.grad(lambda x: jnp.sum(grad(x)))
    third = jax.grad(lambda x: jnp.sum(once(x)))(features)
    # Each bin's cube has third derivative 6.
    assert np.sum(third) == 6 * total > 0


def test_gradient_is_the_same_bits_on_every_run():
    features = distinct_features((6, 7, 3))
    rois = random_rois(12, 6, 7)
    cotangent = jnp.asarray(np.random.default_rng(0).normal(size=(12, 3, 3, 3)), jnp.float32)
    run = pool_and_grad((3, 3), "torchvision")
    first, second = (np.asarray(run(features, rois, cotangent)[2]) for _ in range(2))
    assert np.any(first)
    assert first.tobytes() == second.tobytes()
