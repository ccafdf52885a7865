"""`jax.vmap` equals a Python loop, whatever is mapped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_roipool
import oracle
from harness import assert_same, distinct_features, random_rois, resolved

SETS, HEIGHT, WIDTH, CHANNELS, ROIS, IMAGES = 3, 6, 8, 2, 4, 2
OUTPUT_SIZE = (2, 3)
CONVENTION = "torchvision"


def feature_sets(*lead):
    return distinct_features((*lead, HEIGHT, WIDTH, CHANNELS))


def roi_sets(*lead, images=None):
    count = int(np.prod((*lead, ROIS)))
    rois = random_rois(count, HEIGHT, WIDTH, images=images)
    return rois.reshape(*lead, ROIS, rois.shape[-1])


@pytest.fixture(scope="module")
def pool():
    def pool(features, rois, spatial_scale=1.0, roi_mask=None):
        return jax_roipool.roi_pool_with_argmax(
            features,
            rois,
            OUTPUT_SIZE,
            spatial_scale=spatial_scale,
            roi_mask=roi_mask,
            convention=CONVENTION,
        )

    return pool


def looped(*arguments, in_axes):
    """The oracle on each slice, stacked in front."""
    size = next(
        a.shape[axis] for a, axis in zip(arguments, in_axes, strict=True) if axis is not None
    )
    answers = []
    for i in range(size):
        features, rois, *rest = (
            np.asarray(a if axis is None else jnp.take(a, i, axis))
            for a, axis in zip(arguments, in_axes, strict=True)
        )
        answers.append(oracle.roi_pool(features, rois, OUTPUT_SIZE, resolved(CONVENTION), *rest))
    return tuple(np.stack(parts) for parts in zip(*answers, strict=True))


def check(pool, *arguments, in_axes):
    actual = jax.jit(jax.vmap(pool, in_axes))(*arguments)
    for a, e in zip(actual, looped(*arguments, in_axes=in_axes), strict=True):
        assert_same(a, e)


# One image with [K, 4], a batch with [N, K, 4], a batch with [R, 5]: features, RoIs.
LAYOUTS = {
    "image": (lambda *lead: feature_sets(*lead), lambda *lead: roi_sets(*lead)),
    "batch": (lambda *lead: feature_sets(*lead, IMAGES), lambda *lead: roi_sets(*lead, IMAGES)),
    "flat": (
        lambda *lead: feature_sets(*lead, IMAGES),
        lambda *lead: roi_sets(*lead, images=IMAGES),
    ),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@layouts
def test_over_features(layout, pool):
    features, rois = LAYOUTS[layout]
    check(pool, features(SETS), rois(), in_axes=(0, None))


@layouts
def test_over_rois(layout, pool):
    features, rois = LAYOUTS[layout]
    check(pool, features(), rois(SETS), in_axes=(None, 0))


@layouts
def test_over_both(layout, pool):
    features, rois = LAYOUTS[layout]
    check(pool, features(SETS), rois(SETS), in_axes=(0, 0))


def test_over_spatial_scale(pool):
    scales = jnp.asarray([0.5, 1.0, 0.7])
    check(pool, feature_sets(), roi_sets(), scales, in_axes=(None, None, 0))


def test_over_everything(pool):
    scales = jnp.asarray([0.5, 1.0, 0.7])
    masks = jnp.asarray(np.arange(SETS * ROIS).reshape(SETS, ROIS) % 3 > 0)
    check(pool, feature_sets(SETS), roi_sets(SETS), scales, masks, in_axes=(0, 0, 0, 0))


def test_over_the_mask_alone(pool):
    masks = jnp.asarray(np.arange(SETS * ROIS).reshape(SETS, ROIS) % 3 > 0)
    arguments = (feature_sets(), roi_sets(), jnp.float32(1), masks)
    check(pool, *arguments, in_axes=(None, None, None, 0))


def test_other_in_axes(pool):
    features = jnp.moveaxis(feature_sets(SETS), 0, 2)
    rois = jnp.moveaxis(roi_sets(SETS), 0, 2)
    check(pool, features, rois, in_axes=(2, -1))


def test_other_out_axes(pool):
    features, rois = feature_sets(SETS), roi_sets(SETS)
    actual = jax.vmap(pool, out_axes=(2, -1))(features, rois)
    pooled, argmax = looped(features, rois, in_axes=(0, 0))
    assert_same(actual[0], np.moveaxis(pooled, 0, 2))
    assert_same(actual[1], np.moveaxis(argmax, 0, -1))


def test_nested_over_different_arguments(pool):
    # The outer map takes the features, the inner one the RoIs: every pair.
    features, rois = feature_sets(2), roi_sets(SETS)
    pairs = jax.jit(jax.vmap(jax.vmap(pool, (None, 0)), (0, None)))(features, rois)
    for i in range(2):
        expected = looped(features[i], rois, in_axes=(None, 0))
        assert_same(pairs[0][i], expected[0])
        assert_same(pairs[1][i], expected[1])


def test_nested_the_other_way_round(pool):
    features, rois = feature_sets(2), roi_sets(SETS)
    pairs = jax.jit(jax.vmap(jax.vmap(pool, (0, None)), (None, 0)))(features, rois)
    for i in range(SETS):
        expected = looped(features, rois[i], in_axes=(0, None))
        assert_same(pairs[0][i], expected[0])
        assert_same(pairs[1][i], expected[1])


def test_nested_over_flat_rois(pool):
    features, rois = feature_sets(2, IMAGES), roi_sets(2, SETS, images=IMAGES)
    actual = jax.jit(jax.vmap(jax.vmap(pool, (None, 0))))(features, rois)
    for i in range(2):
        expected = looped(features[i], rois[i], in_axes=(None, 0))
        assert_same(actual[0][i], expected[0])
        assert_same(actual[1][i], expected[1])


def test_bad_rois_stay_bad_under_vmap(pool):
    # An index is out of range by the images of its own group, not of the whole batch.
    rois = np.array(roi_sets(SETS, images=IMAGES))
    rois[0, 0, 0], rois[1, 1, 0], rois[2, 2, 3], rois[2, 0, 0] = IMAGES, -1, np.nan, 0.5
    features = feature_sets(SETS, IMAGES)
    check(pool, features, jnp.asarray(rois), in_axes=(0, 0))


def test_map_of_size_one_and_zero(pool):
    check(pool, feature_sets(1), roi_sets(1), in_axes=(0, 0))
    pooled, argmax = jax.vmap(pool)(feature_sets(0), roi_sets(0))
    assert pooled.shape == argmax.shape == (0, ROIS, *OUTPUT_SIZE, CHANNELS)
