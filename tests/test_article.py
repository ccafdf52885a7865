"""Worked examples with published answers: the article's 8x8 map, and MXNet's documentation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_roipool
from harness import assert_same

MAP = np.array(
    [
        [0.88, 0.44, 0.14, 0.16, 0.37, 0.77, 0.96, 0.27],
        [0.19, 0.45, 0.57, 0.16, 0.63, 0.29, 0.71, 0.70],
        [0.66, 0.26, 0.82, 0.64, 0.54, 0.73, 0.59, 0.26],
        [0.85, 0.34, 0.76, 0.84, 0.29, 0.75, 0.62, 0.25],
        [0.32, 0.74, 0.21, 0.39, 0.34, 0.03, 0.33, 0.48],
        [0.20, 0.14, 0.16, 0.13, 0.73, 0.65, 0.96, 0.32],
        [0.19, 0.69, 0.09, 0.86, 0.88, 0.07, 0.01, 0.48],
        [0.83, 0.24, 0.97, 0.04, 0.24, 0.35, 0.50, 0.91],
    ],
    np.float32,
)[..., None]
REGION = (0.0, 3.0, 7.0, 8.0)
ARTICLE = [[0.85, 0.84], [0.97, 0.96]]


def pool(rois, implementation=None, features=MAP, **options):
    rois = jnp.asarray([rois], jnp.float32)
    features = jnp.asarray(features)
    return jax_roipool.roi_pool_with_argmax(
        features, rois, 2, implementation=implementation, **options
    )


@functools.cache
def all_answers(implementation):
    """What is pooled with argmaxes, the argmaxes, what is pooled alone, and a gradient."""

    @jax.jit
    def run(features):
        def weighted(features):
            pooled, argmax = pool(REGION, implementation, features)
            total = jnp.sum(pooled[0, ..., 0] * jnp.asarray([[1.0, 2.0], [3.0, 4.0]]))
            return total, (pooled, argmax)

        gradient, (pooled, argmax) = jax.grad(weighted, has_aux=True)(features)
        rois = jnp.asarray([REGION])
        alone = jax_roipool.roi_pool(features, rois, (2, 2), implementation=implementation)
        return pooled, argmax, alone, gradient

    return run(jnp.asarray(MAP))


def test_default_gives_the_articles_answer(every_implementation):
    pooled, argmax, alone, _ = all_answers(every_implementation)
    assert_same(pooled[0, ..., 0], np.float32(ARTICLE))
    assert_same(argmax[0, ..., 0], np.int32([[3 * 8 + 0, 3 * 8 + 3], [7 * 8 + 2, 5 * 8 + 6]]))
    assert_same(alone, pooled)


@pytest.mark.parametrize("dtype", (jnp.int32, jnp.bfloat16))
def test_rois_of_other_types_give_the_articles_answer(dtype):
    rois = jnp.asarray([REGION], dtype)
    pooled = jax_roipool.roi_pool(jnp.asarray(MAP), rois, 2)
    assert_same(pooled[0, ..., 0], np.float32(ARTICLE))


def test_image_coordinates_of_a_stride_16_network_give_the_articles_answer():
    pooled, _ = pool(np.multiply(REGION, 16), spatial_scale=1 / 16)
    assert_same(pooled[0, ..., 0], np.float32(ARTICLE))


@pytest.mark.parametrize(
    ("convention", "answer"),
    (
        ("partition", ARTICLE),
        ("torchvision", [[0.85, 0.96], [0.97, 0.91]]),
        ("openvino", [[0.85, 0.96], [0.97, 0.91]]),
        ("chainer", [[0.85, 0.96], [0.97, 0.96]]),
    ),
)
def test_each_convention_gives_its_systems_answer(convention, answer):
    pooled, _ = pool(REGION, convention=convention)
    assert_same(pooled[0, ..., 0], np.float32(answer))


def test_torchvision_convention_on_odd_regions():
    regions = {
        # Inverted: one cell, at the first corner.
        (5, 5, 2, 2): ([[0.65, 0.65], [0.65, 0.65]], [[45, 45], [45, 45]]),
        # Wholly outside.
        (-5, -5, -3, -3): ([[0, 0], [0, 0]], [[-1, -1], [-1, -1]]),
        # Over the border: the bins outside are empty.
        (7, 7, 20, 20): ([[0.91, 0], [0, 0]], [[63, -1], [-1, -1]]),
        # Halves round away from zero, to row 4 and column 3.
        (2.5, 3.5, 2.5, 3.5): ([[0.39, 0.39], [0.39, 0.39]], [[35, 35], [35, 35]]),
    }
    pooled, argmax = jax_roipool.roi_pool_with_argmax(
        jnp.asarray(MAP),
        jnp.asarray(list(regions), jnp.float32),
        2,
        convention="torchvision",
    )
    answers, positions = zip(*regions.values(), strict=True)
    assert_same(pooled[..., 0], np.float32(answers))
    assert_same(argmax[..., 0], np.int32(positions))


@pytest.mark.parametrize(
    ("scale", "answer"), ((1.0, [[14, 16], [26, 28]]), (0.7, [[7, 9], [19, 21]]))
)
def test_mxnet_documentation_example(scale, answer):
    features = np.arange(48, dtype=np.float32).reshape(8, 6, 1)
    pooled, _ = pool((0, 0, 4, 4), features=features, spatial_scale=scale, convention="torchvision")
    assert_same(pooled[0, ..., 0], np.float32(answer))


def test_gradient_goes_to_the_four_cells_of_the_answer(every_implementation):
    expected = np.zeros((8, 8, 1), np.float32)
    expected[3, 0], expected[3, 3], expected[7, 2], expected[5, 6] = 1, 2, 3, 4
    assert_same(all_answers(every_implementation)[3], expected)
