"""What the tests share: compiled calls, one per static configuration, and exact comparisons."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_roipool
from jax_roipool._backends import problem_with
from jax_roipool._backends.rectangle_max import FAMILY
from jax_roipool._check import platform_of_devices

PRESETS = ("partition", "torchvision", "openvino", "chainer")
EVERY_CONVENTION = tuple(
    jax_roipool.Convention(
        inclusive_end=inclusive_end,
        overlapping_bins=overlapping_bins,
        float32_edges=float32_edges,
        empty_value=empty_value,
    )
    for inclusive_end, overlapping_bins, float32_edges, empty_value in itertools.product(
        (False, True), (False, True), (False, True), (0.0, -np.inf)
    )
)


def convention_id(convention):
    """A test id such as `inclusive-overlapping-float32-inf`."""
    if isinstance(convention, str):
        return convention
    words = (
        "inclusive" if convention.inclusive_end else "exclusive",
        "overlapping" if convention.overlapping_bins else "disjoint",
        "float32" if convention.float32_edges else "exact",
        "zero" if convention.empty_value == 0 else "inf",
    )
    return "-".join(words)


def resolved(convention):
    """The convention itself, for the oracle, where the library also takes a name."""
    return jax_roipool.CONVENTIONS[convention] if isinstance(convention, str) else convention


def some_by_default(values, by_default):
    """Parameters of a test: those few by default, and with `--full` all of them."""
    full = pytest.mark.full
    return [x if x in by_default else pytest.param(x, marks=full) for x in values]


@functools.cache
def _platform():
    return platform_of_devices()


def skip_unless_it_can_be_used(implementation):
    """By its name; the reason says what is missing."""
    problem = problem_with(FAMILY.named(implementation), [_platform()])
    if problem is not None:
        pytest.skip(f"implementation {implementation!r}: {problem}")


@functools.cache
def pool(output_size, convention="partition", implementation=None):
    """`roi_pool_with_argmax`, compiled once per shape."""

    @jax.jit
    def run(features, rois, spatial_scale=1.0, roi_mask=None):
        return jax_roipool.roi_pool_with_argmax(
            features,
            rois,
            output_size,
            spatial_scale=spatial_scale,
            roi_mask=roi_mask,
            convention=convention,
            implementation=implementation,
        )

    return run


@functools.cache
def pool_and_grad(output_size, convention="partition", implementation=None):
    """The pooled features, their argmax, and the features' gradient for a given cotangent."""

    @jax.jit
    def run(features, rois, cotangent, spatial_scale=1.0, roi_mask=None):
        def forward(features):
            return jax_roipool.roi_pool_with_argmax(
                features,
                rois,
                output_size,
                spatial_scale=spatial_scale,
                roi_mask=roi_mask,
                convention=convention,
                implementation=implementation,
            )

        pooled, pullback, argmax = jax.vjp(forward, features, has_aux=True)
        return pooled, argmax, pullback(cotangent)[0]

    return run


def as_numpy(array):
    """The array, with bfloat16 widened (exactly) to what NumPy compares by itself."""
    array = np.asarray(array)
    return array.astype(np.float32) if array.dtype == jnp.bfloat16 else array


def assert_same(actual, expected):
    """Same shape, dtype and values; NaN equals NaN, and the sign of a zero does not count."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(as_numpy(actual), as_numpy(expected))


def assert_same_sums(actual, expected):
    """The same bits, or on a GPU, where XLA adds in no fixed order, the same but for rounding."""
    if jax.default_backend() == "gpu":
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    else:
        assert_same(actual, expected)


def distinct_features(shape, seed=0, dtype=np.float32):
    """A map without ties, with negative and positive whole numbers."""
    size = int(np.prod(shape))
    values = np.random.default_rng(seed).permutation(size) - size // 2
    return jnp.asarray(values.reshape(shape), dtype)


def whole_cotangent(shape, seed=0, dtype=np.float32):
    """Small whole numbers, none of them zero: float32 sums of them are exact in any order."""
    values = np.random.default_rng(seed).integers(1, 9, shape)
    return jnp.asarray(values, dtype)


def random_rois(count, height, width, seed=0, images=None):
    """Ordinary RoIs, a little over the border at times; with an image index if `images`."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(-1, 1, (count, 2)) + rng.uniform(0, 0.6, (count, 2)) * (width, height)
    sizes = rng.uniform(0.2, 0.8, (count, 2)) * (width, height)
    rois = np.concatenate([corners, corners + sizes], axis=1)
    if images is not None:
        rois = np.concatenate([rng.integers(0, images, (count, 1)), rois], axis=1)
    return jnp.asarray(rois, np.float32)
