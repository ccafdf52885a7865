"""Every dtype keeps its own values, exactly."""

import jax.numpy as jnp
import numpy as np
import pytest

import oracle
from harness import assert_same, pool, pool_and_grad, random_rois, resolved, whole_cotangent

NARROW = (
    jnp.float32,
    jnp.bfloat16,
    jnp.float16,
    jnp.int8,
    jnp.int16,
    jnp.int32,
    jnp.uint8,
    jnp.uint16,
    jnp.uint32,
)
WIDE = (jnp.float64, jnp.int64, jnp.uint64)
SHAPE = (6, 7, 2)


def name(dtype):
    return np.dtype(dtype).name


def spanning(dtype):
    """A map over the dtype's whole range, with neighbouring values at both ends, and ties."""
    dtype = np.dtype(dtype)
    if np.issubdtype(dtype, np.integer):
        info = np.iinfo(dtype)
        pool = np.array([info.min, info.min + 1, 0, 1, info.max - 1, info.max], dtype)
    else:
        top = jnp.finfo(dtype).max
        eps = jnp.finfo(dtype).eps
        # XLA takes subnormals for zeros when it compares floats on a CPU.
        tiny = float(jnp.finfo(dtype).smallest_subnormal)
        near_zero = [-tiny, 0.0, tiny, 2 * tiny]
        pool = np.array([-top, -1, -1 - eps, *near_zero, 1, 1 + eps, top, -np.inf]).astype(dtype)
    return np.random.default_rng(0).choice(pool, SHAPE)


def check(features, convention):
    rois = np.concatenate([random_rois(5, *SHAPE[:2]), [[9, 9, 12, 12]]]).astype(np.float32)
    pooled, argmax = pool((3, 2), convention)(jnp.asarray(features), rois)
    expected, expected_argmax = oracle.roi_pool(features, rois, (3, 2), resolved(convention))
    assert_same(pooled, expected)
    assert_same(argmax, expected_argmax)
    assert (expected_argmax >= 0).any()
    assert (expected_argmax < 0).any()


@pytest.mark.parametrize("dtype", NARROW, ids=name)
def test_values_are_exact(dtype):
    check(spanning(dtype), "chainer")


@pytest.mark.parametrize("dtype", WIDE, ids=name)
def test_values_are_exact_with_64_bit_types_on(dtype, x64):
    check(spanning(dtype), "chainer")


@pytest.mark.parametrize("dtype", (jnp.int8, jnp.uint8), ids=name)
def test_minus_infinity_is_an_integers_smallest_value(dtype):
    features = jnp.full((2, 2, 1), 7, dtype)
    rois = jnp.asarray([[5.0, 5.0, 6.0, 6.0], [0.0, 0.0, 1.0, 1.0], [np.nan, 0.0, 1.0, 1.0]])
    pooled, argmax = pool((1, 1), "chainer")(features, rois)
    assert pooled.dtype == dtype
    assert pooled.ravel().tolist() == [jnp.iinfo(dtype).min, 7, 0]
    assert argmax.ravel().tolist() == [-1, 0, -1]


def test_integer_minimum_is_a_value_like_any_other():
    # What starts from the minimum must still find the first cell.
    features = jnp.full((3, 3, 1), -128, jnp.int8)
    _, argmax = pool((1, 1), "partition")(features, jnp.asarray([[1.0, 1, 3, 3]]))
    assert argmax.ravel().tolist() == [4]


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16), ids=name)
def test_gradient_has_the_features_dtype(dtype):
    features = np.random.default_rng(1).permutation(6 * 7 * 2).reshape(SHAPE).astype(dtype)
    rois = random_rois(5, 6, 7)
    cotangent = whole_cotangent((5, 3, 2, 2), dtype=dtype)
    run = pool_and_grad((3, 2), "torchvision")
    _, argmax, grad = run(jnp.asarray(features), rois, cotangent)
    expected = oracle.roi_pool_grad(np.asarray(cotangent), np.asarray(argmax), SHAPE, rois)
    assert np.any(expected)
    # Whole numbers under 256 are exact in each of these types.
    assert expected.max() <= 256
    assert_same(grad, expected.astype(dtype))


def test_float64_gradient_has_the_features_dtype(x64):
    features = jnp.asarray([[1, 1 + 1e-12], [0, 0]], jnp.float64)[..., None]
    cotangent = jnp.full((1, 1, 1, 1), 1 + 1e-12, jnp.float64)
    rois = jnp.asarray([[0, 0, 2, 2]], jnp.float32)
    _, _, grad = pool_and_grad((1, 1), "partition")(features, rois, cotangent)
    assert_same(grad[..., 0], np.array([[0, 1 + 1e-12], [0, 0]]))


ROI_DTYPES = (
    jnp.float16,
    jnp.bfloat16,
    jnp.int8,
    jnp.int16,
    jnp.int32,
    jnp.uint8,
    jnp.uint16,
    jnp.uint32,
)


def check_rois(dtype):
    features = np.random.default_rng(2).permutation(2 * 6 * 7).reshape(2, 6, 7, 1)
    features = features.astype(np.float32)
    rois = np.array([[0, 1, 2, 5, 6], [1, 0, 0, 7, 3], [0, 4, 4, 2, 2]]).astype(dtype)
    run = pool((2, 2), "partition")
    pooled, argmax = run(jnp.asarray(features), jnp.asarray(rois), 0.7)
    expected, expected_argmax = oracle.roi_pool(features, rois, (2, 2), resolved("partition"), 0.7)
    assert_same(pooled, expected)
    assert_same(argmax, expected_argmax)


@pytest.mark.parametrize("dtype", ROI_DTYPES, ids=name)
def test_rois_of_any_real_dtype(dtype):
    check_rois(dtype)


@pytest.mark.parametrize("dtype", (jnp.float64, jnp.int64), ids=name)
def test_rois_of_any_real_dtype_with_64_bit_types_on(dtype, x64):
    check_rois(dtype)


@pytest.mark.parametrize(
    "dtype", (jnp.int8, jnp.uint8, jnp.int16, jnp.uint16, jnp.float16, jnp.bfloat16), ids=name
)
def test_a_narrow_image_index_among_more_images_than_it_can_count(dtype):
    features = jnp.arange(70_000.0).reshape(70_000, 1, 1, 1)
    rois = jnp.asarray([[127, 0, 0, 1, 1], [3, 0, 0, 1, 1]], dtype)
    assert pool((1, 1))(features, rois)[0].ravel().tolist() == [127, 3]


def test_int64_image_index_does_not_wrap(x64):
    features = jnp.ones((2, 3, 3, 1), jnp.float32)
    rois = jnp.asarray([[2**32, 0, 0, 3, 3], [-(2**32), 0, 0, 3, 3], [1, 0, 0, 3, 3]], jnp.int64)
    pooled, argmax = pool((1, 1), "partition")(features, rois)
    assert pooled.ravel().tolist() == [0, 0, 1]
    assert argmax.ravel().tolist() == [-1, -1, 0]


def test_float64_image_index_is_read_in_full(x64):
    features = jnp.ones((2, 3, 3, 1), jnp.float32)
    rois = jnp.asarray([[1e-12, 0, 0, 3, 3], [1, 0, 0, 3, 3], [1 + 1e-12, 0, 0, 3, 3]])
    assert rois.dtype == jnp.float64
    pooled, _ = pool((1, 1), "partition")(features, rois)
    assert pooled.ravel().tolist() == [0, 1, 0]


def test_coordinates_are_float32_even_with_64_bit_types_on(x64):
    # 2.5 less a little is 2.5 in float32.
    features = jnp.arange(6.0, dtype=jnp.float64).reshape(1, 6, 1)
    rois = jnp.asarray([[2.5 - 1e-12, 0, 3, 1]], jnp.float64)
    _, argmax = pool((1, 1), "partition")(features, rois)
    assert argmax.ravel().tolist() == [3]


def test_argmax_stays_int32_with_64_bit_types_on(x64):
    features = jnp.ones((2, 2, 1), jnp.float64)
    _, argmax = pool((1, 1), "partition")(features, jnp.asarray([[1, 1, 2, 2]]))
    assert_same(argmax, np.full((1, 1, 1, 1), 3, np.int32))
