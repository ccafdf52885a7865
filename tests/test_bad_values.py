"""Bad RoIs and odd feature values: nothing around them changes, nothing is read out of place."""

import jax.numpy as jnp
import numpy as np
import pytest

import oracle
from harness import (
    PRESETS,
    assert_same,
    distinct_features,
    pool,
    pool_and_grad,
    resolved,
    whole_cotangent,
)

FEATURES = distinct_features((3, 5, 6, 2)) + 100
GOOD = [[0, 0, 0, 4, 4], [2, 1, 1, 6, 5], [1, 2, 0, 5, 3]]
BAD = [
    [-1, 0, 0, 4, 4],
    [3, 0, 0, 4, 4],
    [0.5, 0, 0, 4, 4],
    [-0.5, 0, 0, 4, 4],
    [2.0000002, 0, 0, 4, 4],
    [np.nan, 0, 0, 4, 4],
    [np.inf, 0, 0, 4, 4],
    [-np.inf, 0, 0, 4, 4],
    [2.0**31, 0, 0, 4, 4],
    [2.0**32, 0, 0, 4, 4],
    [-(2.0**32), 0, 0, 4, 4],
    [2.0**32 + 512, 0, 0, 4, 4],
    [3e38, 0, 0, 4, 4],
    [0, np.nan, 0, 4, 4],
    [0, 0, np.nan, 4, 4],
    [0, 0, 0, np.nan, 4],
    [0, 0, 0, 4, np.nan],
    [0, np.inf, 0, 4, 4],
    [0, -np.inf, 0, 4, 4],
    [0, 0, 0, np.inf, 4],
    [0, 0, 0, 4, -np.inf],
    [1, np.nan, np.nan, np.nan, np.nan],
]


def interleaved():
    """Each bad RoI between two good ones; and which are good."""
    rows, good = [], []
    for i, bad in enumerate(BAD):
        rows += [GOOD[i % 3], bad]
        good += [True, False]
    return np.float32([*rows, GOOD[0]]), np.array([*good, True])


@pytest.mark.parametrize("convention", PRESETS)
def test_bad_rois_pool_to_zero_and_leave_their_neighbours_alone(convention):
    rois, good = interleaved()
    # NaN for every bad RoI: multiplying by zero would not hold it back.
    cotangent = np.array(whole_cotangent((len(rois), 2, 2, 2)))
    cotangent[~good] = np.nan
    run = pool_and_grad((2, 2), convention)
    pooled, argmax, grad = run(FEATURES, rois, cotangent)

    assert_same(pooled[~good], np.zeros((len(BAD), 2, 2, 2), np.float32))
    assert_same(argmax[~good], np.full((len(BAD), 2, 2, 2), -1, np.int32))
    alone, alone_argmax = oracle.roi_pool(FEATURES, rois[good], (2, 2), resolved(convention))
    assert np.all(alone > 0)
    assert_same(pooled[good], alone)
    assert_same(argmax[good], alone_argmax)
    expected = oracle.roi_pool_grad(cotangent[good], alone_argmax, FEATURES.shape, rois[good])
    assert_same(grad, expected.astype(np.float32))


def test_negative_zero_is_an_image_index():
    run = pool((1, 1), "partition")
    pooled, _ = run(FEATURES, jnp.asarray([[-0.0, 0, 0, 6, 5]]))
    assert_same(pooled[0, 0, 0], np.asarray(FEATURES[0]).max((0, 1)))


@pytest.mark.parametrize("dtype", (jnp.int32, jnp.int8, jnp.uint32, jnp.uint8))
def test_bad_integer_image_indices(dtype):
    info = jnp.iinfo(dtype)
    rois = np.zeros((4, 5), dtype)
    rois[:, 3:] = 4
    rois[:, 0] = info.min, info.max, 3, 2
    pooled, argmax = pool((1, 1), "partition")(FEATURES, jnp.asarray(rois))
    expected, expected_argmax = oracle.roi_pool(FEATURES, rois, (1, 1), resolved("partition"))
    assert_same(pooled, expected)
    assert_same(argmax, expected_argmax)
    assert argmax[1:].max(axis=(1, 2, 3)).tolist()[:2] == [-1, -1]
    assert np.all(pooled[3] > 0)


@pytest.mark.parametrize("scale", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("convention", PRESETS)
def test_traced_scale_that_is_not_finite_makes_every_roi_bad(scale, convention):
    rois = jnp.asarray(GOOD, jnp.float32)
    cotangent = jnp.full((3, 2, 2, 2), np.nan, jnp.float32)
    run = pool_and_grad((2, 2), convention)
    assert np.any(run(FEATURES, rois, cotangent, 1.0)[0])
    pooled, argmax, grad = run(FEATURES, rois, cotangent, scale)
    assert not np.any(pooled)
    assert np.all(argmax == -1)
    assert not np.any(grad)


@pytest.mark.parametrize("scale", (0.0, -1.0, 1e-40, 3e38))
def test_traced_scale_of_any_finite_value_is_only_a_factor(scale):
    rois = np.float32(GOOD)
    pooled, argmax = pool((2, 2), "torchvision")(FEATURES, rois, scale)
    expected, expected_argmax = oracle.roi_pool(
        FEATURES, rois, (2, 2), resolved("torchvision"), scale
    )
    assert np.any(expected)
    assert_same(pooled, expected)
    assert_same(argmax, expected_argmax)


@pytest.mark.parametrize("convention", PRESETS)
def test_masked_rois_pool_to_zero_whatever_they_hold(convention):
    rois = np.float32([GOOD[0], BAD[0], GOOD[1], GOOD[2]])
    mask = np.array([False, False, True, False])
    cotangent = np.full((4, 2, 2, 2), np.nan, np.float32)
    cotangent[2] = 1
    run = pool_and_grad((2, 2), convention)
    pooled, argmax, grad = run(FEATURES, rois, cotangent, 1.0, mask)
    assert_same(pooled[~mask], np.zeros((3, 2, 2, 2), np.float32))
    assert_same(argmax[~mask], np.full((3, 2, 2, 2), -1, np.int32))
    assert np.all(pooled[2] > 0)
    assert np.sum(grad) == 8


def test_mask_cannot_make_a_bad_roi_good():
    mask = np.ones(len(BAD) + 1, bool)
    run = pool((2, 2), "partition")
    pooled, argmax = run(FEATURES, np.float32([*BAD, GOOD[0]]), 1.0, mask)
    assert not np.any(pooled[:-1])
    assert np.all(argmax[:-1] == -1)
    assert np.all(pooled[-1] > 0)


def test_mask_of_per_image_rois():
    rois = np.float32([[[0, 0, 4, 4], [1, 1, 6, 5]]] * 3)
    mask = np.array([[True, False], [False, True], [False, False]])
    pooled, argmax = pool((2, 2), "partition")(FEATURES, rois, 1.0, mask)
    expected, expected_argmax = oracle.roi_pool(
        FEATURES, rois, (2, 2), resolved("partition"), roi_mask=mask
    )
    assert np.any(expected)
    assert_same(pooled, expected)
    assert_same(argmax, expected_argmax)


@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
def test_values_outside_a_bin_do_not_reach_it(value):
    # Another image, other rows, other columns, and the cells just past the border of the RoI.
    features = np.full((3, 5, 6, 1), value, np.float32)
    features[1, 1:4, 2:5] = np.arange(9, dtype=np.float32).reshape(3, 3, 1) - 20
    rois = np.float32([[1, 2, 1, 5, 4]])
    for convention in ("partition", "chainer"):
        run = pool_and_grad((3, 3), convention)
        pooled, _, grad = run(features, rois, np.ones((1, 3, 3, 1), np.float32))
        assert_same(pooled[0], features[1, 1:4, 2:5])
        expected = np.zeros(features.shape, np.float32)
        expected[1, 1:4, 2:5] = 1
        assert_same(grad, expected)


def test_values_of_one_channel_do_not_reach_another():
    features = np.full((3, 3, 3), -1, np.float32)
    features[..., 0], features[..., 2] = np.nan, np.inf
    rois = np.float32([[0, 0, 3, 3]])
    pooled, argmax = pool((1, 1), "partition")(features, rois)
    assert_same(pooled.ravel(), np.float32([np.nan, -1, np.inf]))
    assert argmax.ravel().tolist() == [0, 0, 0]


@pytest.mark.parametrize("convention", PRESETS)
def test_nan_reaches_exactly_the_bins_that_hold_it(convention):
    features = np.array(distinct_features((9, 9, 1)))
    features[4, 4] = np.nan
    rois = np.float32([[0, 0, 8, 8], [3, 3, 6, 6], [4, 4, 4, 4], [5, 0, 8, 8]])
    pooled, argmax = pool((3, 3), convention)(features, rois)
    expected, expected_argmax = oracle.roi_pool(features, rois, (3, 3), resolved(convention))
    assert np.isnan(expected).any()
    assert not np.isnan(expected).all()
    assert_same(pooled, expected)
    assert_same(argmax, expected_argmax)
    assert np.all(np.asarray(argmax)[np.isnan(expected)] == 4 * 9 + 4)


@pytest.mark.parametrize("sign", (1, -1))
def test_nan_of_either_sign_is_a_nan(sign):
    features = np.float32([[3, np.copysign(np.nan, sign), np.inf]])[..., None]
    rois = np.float32([[0, 0, 3, 1]])
    pooled, argmax = pool((1, 1), "partition")(features, rois)
    assert np.isnan(pooled).all()
    assert argmax.ravel().tolist() == [1]


@pytest.mark.parametrize("convention", PRESETS)
def test_bin_of_minus_infinity_has_an_argmax(convention):
    features = np.full((4, 4, 1), -np.inf, np.float32)
    rois = np.float32([[1, 1, 3, 3], [8, 8, 9, 9]])
    cotangent = np.ones((2, 1, 1, 1), np.float32)
    run = pool_and_grad((1, 1), convention)
    pooled, argmax, grad = run(features, rois, cotangent)
    assert pooled.ravel().tolist() == [-np.inf, resolved(convention).empty_value]
    assert argmax.ravel().tolist() == [5, -1]
    expected = np.zeros((4, 4, 1), np.float32)
    expected[1, 1] = 1
    assert_same(grad, expected)


@pytest.mark.parametrize("convention", PRESETS)
def test_empty_bins_pass_no_gradient(convention):
    features = np.array(distinct_features((4, 4, 1))) + 50
    rois = np.float32([[2, 2, 6, 6]])
    cotangent = np.full((1, 4, 4, 1), np.nan, np.float32)
    _, argmax = oracle.roi_pool(features, rois, (4, 4), resolved(convention))
    cotangent[argmax >= 0] = 1
    run = pool_and_grad((4, 4), convention)
    pooled, _, grad = run(features, rois, cotangent)
    empty = resolved(convention).empty_value
    assert np.all(np.asarray(pooled)[argmax < 0] == empty)
    assert np.sum(grad) == (argmax >= 0).sum() > 0
