"""The other averages: values, gradients of features and of RoIs, bad values, against NumPy."""

import functools

import jax
import numpy as np
import pytest
from test_roi_align import assert_close
from test_taps import hostile_rois

import average_oracle as oracle
import jax_roipool
from harness import assert_same_sums, random_rois, some_by_default

N, K, H, W = 2, 24, 9, 13
BINS = (3, 4)
SCALE = np.float32(0.7)
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(N, H, W, 24)).astype(np.float32)
ROIS = np.concatenate([random_rois(30, H, W) / SCALE, hostile_rois(N * K - 30, seed=1) / 2])
ROIS = RNG.permutation(ROIS).reshape(N, K, 4)
ROIS[0, 3, 1] = np.nan
ROIS[1, 5, 2] = np.inf
MASK = np.arange(N * K).reshape(N, K) % 7 > 0


@functools.cache
def pool_and_grads(operator, **options):
    """What is pooled, and the gradients of features and RoIs."""

    @jax.jit
    def run(features, rois, cotangent, spatial_scale, roi_mask):
        def forward(features, rois):
            return getattr(jax_roipool, operator)(
                features, rois, BINS, spatial_scale, roi_mask=roi_mask, **options
            )

        pooled, pullback = jax.vjp(forward, features, rois)
        return pooled, *pullback(cotangent)

    return run


def average_weights(convention):
    def weights(*arguments):
        features_shape, rois, output_size, scale, mask = arguments
        convention_ = jax_roipool.CONVENTIONS[convention]
        return oracle.roi_average_pool_weights(
            features_shape, rois, output_size, convention_, scale, mask
        )

    return weights


def align_weights(ratio):
    def weights(features_shape, rois, output_size, scale, mask):
        return oracle.ps_roi_align_weights(
            features_shape, rois, output_size, scale, sampling_ratio=ratio, roi_mask=mask
        )

    return weights


OPERATORS = {
    "partition": ("roi_average_pool", {}, average_weights("partition"), 2),
    "torchvision": (
        "roi_average_pool",
        {"convention": "torchvision"},
        average_weights("torchvision"),
        2,
    ),
    "chainer": ("roi_average_pool", {"convention": "chainer"}, average_weights("chainer"), 2),
    "precise": ("pr_roi_pool", {}, oracle.pr_roi_pool_weights, 2),
    "own channels, 2 samples": ("ps_roi_align", {"sampling_ratio": 2}, align_weights(2), 24),
    "own channels, adaptive": ("ps_roi_align", {}, align_weights(None), 24),
    "own channels, whole cells": ("ps_roi_pool", {}, oracle.ps_roi_pool_weights, 24),
}


@pytest.mark.parametrize(
    "case",
    some_by_default(
        OPERATORS, ("partition", "precise", "own channels, 2 samples", "own channels, whole cells")
    ),
)
def test_values_and_gradients(case):
    operator, options, of_weights, channels = OPERATORS[case]
    features = FEATURES[..., :channels]
    cotangent = RNG.normal(size=(N, K, *BINS, 2)).astype(np.float32)
    pooled, gradient, rois_gradient = pool_and_grads(operator, **options)(
        features, ROIS, cotangent, SCALE, MASK
    )
    weights = of_weights(features.shape, ROIS, BINS, SCALE, MASK)
    slack = 16 if operator == "pr_roi_pool" else 1  # as coordinates are rounded as well
    assert_close(pooled, oracle.pool(features, weights), slack * np.abs(features).max())
    size = oracle.pool_grad(np.abs(cotangent), features.shape, weights)
    wanted = oracle.pool_grad(cotangent, features.shape, weights)
    assert_close(gradient, wanted, 4 * size + (slack - 1) * size.max())
    assert np.asarray(pooled).any(axis=(2, 3, 4)).mean() > 0.4
    assert not np.asarray(pooled)[~MASK].any()
    if operator != "pr_roi_pool":
        assert not np.asarray(rois_gradient).any()
        return
    wanted = oracle.box_grad(cotangent, features, weights)
    size = np.abs(wanted).max()
    sides = np.nan_to_num(ROIS[..., 2:] - ROIS[..., :2])
    large = MASK & (np.abs(sides) > 0.1).all(axis=-1)  # smaller ones are a difference of few bits
    np.testing.assert_allclose(rois_gradient[large], wanted[large], rtol=2e-4, atol=2e-5 * size)
    assert not np.asarray(rois_gradient)[~MASK].any()


def test_precise_pooling_of_rois_without_area_and_off_the_map():
    rois = np.float32([[2, 2, 2, 5], [5, 5, 3, 3], [20, 2, 30, 5], [-5, -5, -1, -1]])
    rois = np.broadcast_to(np.pad(rois, [(0, K - 4), (0, 0)]), (N, K, 4))
    features = np.where(np.arange(W)[:, None] < 7, FEATURES[..., :2], np.nan).astype(np.float32)
    cotangent = np.ones((N, K, *BINS, 2), np.float32)
    for result in pool_and_grads("pr_roi_pool")(
        features, rois, cotangent, np.float32(1), MASK | True
    ):
        assert not np.asarray(result).any()


def test_precise_pooling_reads_no_cell_that_a_roi_does_not_touch():
    rois = np.float32([[1.2, 2.3, 5.8, 6.9]] * K)[None].repeat(N, axis=0)
    inside = np.zeros((H, W, 1), bool)
    inside[2:8, 1:7] = True
    cotangent = RNG.normal(size=(N, K, *BINS, 2)).astype(np.float32)
    run = pool_and_grads("pr_roi_pool")
    wanted = run(FEATURES[..., :2], rois, cotangent, np.float32(1), MASK)
    hidden = np.where(inside, FEATURES[..., :2], np.float32(np.nan))
    for actual, expected in zip(
        run(hidden, rois, cotangent, np.float32(1), MASK), wanted, strict=True
    ):
        assert_same_sums(actual, expected)


R = 40
INDICES = RNG.integers(-1, N + 1, R)
BOXES = RNG.uniform(-0.3, 1.3, (R, 4)).astype(np.float32)
BOXES[:8] = RNG.integers(0, 3, (8, 4)) / 2
BOXES[9, 2] = np.nan
BOXES[11, 0] = -np.inf


@functools.cache
def crop_and_grads(crop_size):
    @jax.jit
    def run(images, boxes, box_indices, cotangent):
        def forward(images, boxes):
            return jax_roipool.crop_and_resize(
                images, boxes, box_indices, crop_size, extrapolation_value=2.5
            )

        crops, pullback = jax.vjp(forward, images, boxes)
        return crops, *pullback(cotangent)

    return run


@pytest.mark.parametrize("crop_size", some_by_default(((3, 4), (1, 5), (2, 1)), ((1, 5),)))
def test_crops(crop_size):
    images = FEATURES[..., :2]
    cotangent = RNG.normal(size=(R, *crop_size, 2)).astype(np.float32)
    crops, gradient, boxes_gradient = crop_and_grads(crop_size)(images, BOXES, INDICES, cotangent)
    wanted = oracle.crop_and_resize(images, BOXES, INDICES, crop_size, 2.5)
    assert_close(crops, wanted, np.abs(images).max())
    np.testing.assert_array_equal(np.asarray(crops) == 2.5, wanted == 2.5)
    weights, inside = oracle.crop_and_resize_weights(images.shape, BOXES, INDICES, crop_size)
    cotangent = np.where(inside[..., None], cotangent, 0)
    size = oracle.pool_grad(np.abs(cotangent), images.shape, weights)
    assert_close(gradient, oracle.pool_grad(cotangent, images.shape, weights), 4 * size)
    wanted = oracle.box_grad(cotangent, images, weights)
    np.testing.assert_allclose(boxes_gradient, wanted, rtol=1e-4, atol=1e-4)
    bad = (INDICES < 0) | (INDICES >= N) | ~np.isfinite(BOXES).all(1)
    assert not np.asarray(boxes_gradient)[bad].any()
    assert (np.asarray(crops)[bad] == 2.5).all()


@pytest.mark.full
def test_crops_in_every_mode():
    """Forward, reverse, and one over the other, of a function that is linear in no argument."""
    arguments = FEATURES[:1, :, :, 0, None], np.float32([[0.1, 0.2, 0.7, 0.6]])
    directions = tuple(RNG.normal(size=x.shape).astype(np.float32) for x in arguments)

    def loss(images, boxes):
        return (jax_roipool.crop_and_resize(images, boxes, [0], 2) ** 2).sum()

    def dot(x, y):
        return sum((a * b).sum() for a, b in zip(x, y, strict=True))

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    _, tangent = jax.jit(lambda *x: jax.jvp(loss, x, directions))(*arguments)
    np.testing.assert_allclose(tangent, dot(gradient(*arguments), directions), rtol=1e-4)

    def slope(step):
        moved = (x + step * d for x, d in zip(arguments, directions, strict=True))
        return dot(gradient(*moved), directions)

    _, second = jax.jit(lambda *x: jax.jvp(gradient, x, directions))(*arguments)
    numeric = (slope(2e-3) - slope(-2e-3)) / 4e-3
    np.testing.assert_allclose(dot(second, directions), numeric, rtol=2e-2)


ERRORS = (
    (ValueError, "ps_roi_align", (np.ones((4, 5, 6)), np.ones((2, 4)), 2), "P \\* Q = 4"),
    (TypeError, "roi_average_pool", (np.ones((4, 5, 1), int), np.ones((2, 4)), 2), "features"),
    (ValueError, "crop_and_resize", (np.ones((4, 5, 1)), np.ones((2, 4)), [0, 0], 2), "images"),
    (TypeError, "crop_and_resize", (np.ones((1, 4, 5, 1)), np.ones((1, 4)), [0.5], 2), "box_ind"),
    (ValueError, "crop_and_resize", (np.ones((1, 4, 5, 1)), np.ones((1, 4)), [0, 0], 2), "boxes"),
    (ValueError, "crop_and_resize", (np.ones((1, 4, 5, 1)), np.ones((1, 4)), [0], 0), "crop_size"),
)


@pytest.mark.parametrize("case", range(len(ERRORS)))
def test_errors(case):
    error, operator, arguments, message = ERRORS[case]
    with pytest.raises(error, match=message):
        getattr(jax_roipool, operator)(*arguments)
