"""The compiled programs' working memory: no array of RoIs times map, no copies of the map."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_roipool
from harness import skip_unless_it_can_be_used, some_by_default
from jax_roipool._backends.rectangle_max import dense

HEIGHT, WIDTH, CHANNELS = 40, 48, 32
MAP_BYTES = 4 * HEIGHT * WIDTH * CHANNELS
OUTPUT_SIZE = 2
FEW, MANY = 64, 1024
# Pooled values and their argmax, and some arrays of their size on the way.
BIN_BYTES = 8 * OUTPUT_SIZE**2 * CHANNELS
PER_ROI = 16 * BIN_BYTES

# What the bounds are set against: one map per RoI would be thirty times over.
assert PER_ROI * 7 < MAP_BYTES


@pytest.fixture(
    params=some_by_default(("cpu", "blocks", "dense", "segment_max"), ("cpu", "blocks"))
)
def pool(request, monkeypatch):
    implementation = request.param
    skip_unless_it_can_be_used(implementation)
    monkeypatch.setattr(dense, "CHUNK_BYTES", 1 << 20)  # by default more than all of these maps
    jax.clear_caches()
    return functools.partial(
        jax_roipool.roi_pool, output_size=OUTPUT_SIZE, implementation=implementation
    )


def features(*lead):
    shape = (*lead, HEIGHT, WIDTH, CHANNELS)
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def rois(*lead, images=None):
    boxes = np.broadcast_to(np.float32([0, 0, WIDTH, HEIGHT]), (*lead, 4))
    if images is not None:
        index = np.arange(np.prod(lead)).reshape(*lead, 1) % images
        boxes = np.concatenate([index, boxes], axis=-1)
    return jnp.asarray(boxes, jnp.float32)


def compiled_and_bytes(function, *arguments):
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled, compiled.memory_analysis().temp_size_in_bytes


def assert_growth_is_per_bin(function, arguments):
    """`arguments(count)` for many RoIs need little more than for few; returns a result."""
    _, few = compiled_and_bytes(function, *arguments(FEW))
    compiled, many = compiled_and_bytes(function, *arguments(MANY))
    assert many - few < PER_ROI * (MANY - FEW)
    return compiled(*arguments(MANY))


def test_forward_memory_does_not_grow_with_rois_times_map(pool):
    x = features()
    pooled = assert_growth_is_per_bin(pool, lambda count: (x, rois(count)))
    np.testing.assert_array_equal(pooled.max((0, 1, 2)), x.max((0, 1)))


def test_forward_memory_with_rois_per_image(pool):
    x = features(2)
    pooled = assert_growth_is_per_bin(pool, lambda count: (x, rois(2, count // 2)))
    np.testing.assert_array_equal(pooled.max((1, 2, 3)), x.max((1, 2)))


def test_forward_memory_with_flat_rois(pool):
    x = features(2)
    pooled = assert_growth_is_per_bin(pool, lambda count: (x, rois(count, images=2)))
    np.testing.assert_array_equal(pooled[::2].max((0, 1, 2)), x[0].max((0, 1)))
    np.testing.assert_array_equal(pooled[1::2].max((0, 1, 2)), x[1].max((0, 1)))


def test_gradient_memory_does_not_grow_with_rois_times_map(pool):
    def grad(x, rois):
        return jax.grad(lambda x: jnp.sum(pool(x, rois)))(x)

    x = features()
    total = assert_growth_is_per_bin(grad, lambda count: (x, rois(count)))
    assert np.sum(total) == MANY * OUTPUT_SIZE**2 * CHANNELS


def test_gradient_memory_with_flat_rois(pool):
    def grad(x, rois):
        return jax.grad(lambda x: jnp.sum(pool(x, rois)))(x)

    x = features(2)
    total = assert_growth_is_per_bin(grad, lambda count: (x, rois(count, images=2)))
    assert np.sum(total) == MANY * OUTPUT_SIZE**2 * CHANNELS


def test_vmap_over_rois_does_not_copy_the_map(pool):
    sets, count = 128, 8
    x = features()
    mapped = jax.vmap(pool, (None, 0))
    _, together = compiled_and_bytes(pool, x, rois(sets * count))
    compiled, apart = compiled_and_bytes(mapped, x, rois(sets, count))
    # The same RoIs in one set, and then some; a copy a set would be 128 maps.
    assert apart < together + 2 * MAP_BYTES
    pooled = compiled(x, rois(sets, count))
    np.testing.assert_array_equal(pooled.max((0, 1, 2, 3)), x.max((0, 1)))


def test_vmap_over_flat_rois_does_not_copy_the_maps(pool):
    sets, count, images = 128, 8, 2
    x = features(images)
    mapped = jax.vmap(pool, (None, 0))
    _, together = compiled_and_bytes(pool, x, rois(sets * count, images=images))
    compiled, apart = compiled_and_bytes(mapped, x, rois(sets, count, images=images))
    assert apart < together + 2 * images * MAP_BYTES
    pooled = compiled(x, rois(sets, count, images=images))
    np.testing.assert_array_equal(pooled[:, ::2].max((0, 1, 2, 3)), x[0].max((0, 1)))


def test_vmap_over_scales_does_not_copy_the_map(pool):
    count = 8
    x, scales = features(), jnp.linspace(0.5, 1, 128)

    def scaled(x, rois, scale):
        return pool(x, rois, spatial_scale=scale)

    mapped = jax.vmap(scaled, (None, None, 0))
    _, together = compiled_and_bytes(pool, x, rois(128 * count))
    compiled, apart = compiled_and_bytes(mapped, x, rois(count), scales)
    assert apart < together + 2 * MAP_BYTES
    pooled = compiled(x, rois(count), scales)
    np.testing.assert_array_equal(pooled[-1].max((0, 1, 2)), x.max((0, 1)))
