"""Sizes of zero and one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_roipool
from harness import assert_same, distinct_features, pool, pool_and_grad

ZERO_SIZES = {
    "no RoIs on one image": ((4, 5, 2), (0, 4)),
    "no RoIs on a batch": ((3, 4, 5, 2), (3, 0, 4)),
    "no flat RoIs": ((3, 4, 5, 2), (0, 5)),
    "no images": ((0, 4, 5, 2), (0, 3, 4)),
    "no images and no flat RoIs": ((0, 4, 5, 2), (0, 5)),
    "no images, with flat RoIs": ((0, 4, 5, 2), (3, 5)),
    "no channels": ((4, 5, 0), (3, 4)),
    "no channels on a batch": ((2, 4, 5, 0), (2, 3, 4)),
    "no channels with flat RoIs": ((2, 4, 5, 0), (3, 5)),
}


@pytest.fixture(scope="module", autouse=True)
def operator_answers():
    """Zero sizes alone would not notice an operator that gives nothing but zeros."""
    features, rois = jnp.full((1, 1, 1), 7.0), jnp.zeros((1, 4))
    pooled, _ = pool((1, 1), "partition")(features, rois)
    assert pooled.ravel().tolist() == [7]


@pytest.mark.parametrize("case", ZERO_SIZES)
def test_zero_sizes_pool_and_differentiate(case):
    features_shape, rois_shape = ZERO_SIZES[case]
    pooled_shape = (*rois_shape[:-1], 2, 3, features_shape[-1])
    features, rois = jnp.ones(features_shape), jnp.zeros(rois_shape)
    cotangent = jnp.ones(pooled_shape)
    run = pool_and_grad((2, 3), "partition")
    pooled, argmax, grad = run(features, rois, cotangent)
    # Where there are bins at all, they have no image to read: each RoI is bad.
    assert_same(pooled, np.zeros(pooled_shape, np.float32))
    assert_same(argmax, np.full(pooled_shape, -1, np.int32))
    assert_same(grad, np.zeros(features_shape, np.float32))


def test_zero_sized_mask():
    run = pool((2, 2), "partition")
    pooled, _ = run(jnp.ones((4, 5, 2)), jnp.zeros((0, 4)), 1.0, jnp.ones(0, bool))
    assert pooled.shape == (0, 2, 2, 2)


def test_zero_sizes_under_vmap():
    def run(features, rois):
        return jax_roipool.roi_pool(features, rois, 2)

    assert jax.vmap(run)(jnp.ones((3, 4, 5, 2)), jnp.ones((3, 0, 4))).shape == (3, 0, 2, 2, 2)
    assert jax.vmap(run, (None, 0))(jnp.ones((4, 5, 2)), jnp.ones((0, 3, 4))).shape[:2] == (0, 3)


def test_one_cell_map():
    features = jnp.asarray([[[-3.0, 5.0]]])
    rois = jnp.asarray([[0.0, 0, 1, 1], [0, 0, 0, 0], [-9, -9, 9, 9], [1, 1, 2, 2]])
    cotangent = jnp.ones((4, 1, 1, 2))
    run = pool_and_grad((1, 1), "partition")
    pooled, argmax, grad = run(features, rois, cotangent)
    assert_same(pooled[:, 0, 0], np.float32([[-3, 5], [-3, 5], [-3, 5], [0, 0]]))
    assert_same(argmax[:, 0, 0], np.int32([[0, 0], [0, 0], [0, 0], [-1, -1]]))
    assert_same(grad, np.float32([[[3, 3]]]))


def test_one_cell_map_in_many_bins():
    features = jnp.asarray([[[7.0]]])
    pooled, argmax = pool((3, 3), "partition")(features, jnp.zeros((1, 4)))
    assert_same(pooled, np.full((1, 3, 3, 1), 7, np.float32))
    assert not np.any(argmax)


@pytest.mark.parametrize("shape", ((1, 8, 2), (8, 1, 2)))
def test_one_row_and_one_column(shape):
    features = distinct_features(shape)
    rois = jnp.asarray([[0.0, 0.0, shape[1], shape[0]]])
    pooled, _ = pool((1, 1), "partition")(features, rois)
    assert_same(pooled[0, 0, 0], np.asarray(features).max((0, 1)))


def test_more_bins_than_the_map_has_cells():
    features = distinct_features((3, 2, 1))
    pooled, argmax = pool((9, 8), "partition")(features, jnp.asarray([[0.0, 0, 2, 3]]))
    repeated = np.asarray(features).repeat(3, axis=0).repeat(4, axis=1)
    assert_same(pooled[0], repeated)
    assert np.all(argmax >= 0)


def test_no_rois_beside_a_call_with_rois():
    # The same compiled function, other shapes.
    run = pool((2, 2), "partition")
    features = distinct_features((5, 5, 1)) + 50
    assert run(features, jnp.zeros((0, 4)))[0].shape == (0, 2, 2, 1)
    assert np.all(run(features, jnp.asarray([[0.0, 0, 5, 5]]))[0] > 0)


def test_zero_sizes_without_jit():
    for features_shape, rois_shape in ZERO_SIZES.values():
        pooled = jax_roipool.roi_pool(jnp.ones(features_shape), jnp.zeros(rois_shape), 2)
        assert pooled.shape == (*rois_shape[:-1], 2, 2, features_shape[-1])
