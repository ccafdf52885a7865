"""The TPU kernels' own seams, by the TPU interpreter: strips, packs, channels, lists."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import interpreted_tpu
import jax_roipool
import oracle
from harness import assert_same, distinct_features, random_rois, resolved, whole_cotangent
from jax_roipool._backends.tpu import pool as pool_kernel
from jax_roipool._backends.tpu import scatter as scatter_kernel
from jax_roipool._backends.tpu import schedule

NAME = interpreted_tpu.NAME

interpreted = pytest.mark.usefixtures("interpreter")


def check(features, rois, output_size, convention="torchvision", roi_mask=None):
    """Pooled features, argmax, gradient, and pooled features without argmax, by the oracle."""
    features, rois = jnp.asarray(features), jnp.asarray(rois)
    wanted, argmax = oracle.roi_pool(
        features, rois, output_size, resolved(convention), roi_mask=roi_mask
    )
    cotangent = whole_cotangent(wanted.shape, dtype=features.dtype)
    gradient = oracle.roi_pool_grad(cotangent, argmax, features.shape, rois)

    options = {"convention": convention, "roi_mask": roi_mask, "implementation": NAME}

    def both(features):
        return jax_roipool.roi_pool_with_argmax(features, rois, output_size, **options)

    @jax.jit
    def run(features):
        pooled, pullback, argmax = jax.vjp(both, features, has_aux=True)
        alone = jax_roipool.roi_pool(features, rois, output_size, **options)
        return pooled, argmax, pullback(cotangent)[0], alone

    expected = wanted, argmax, gradient.astype(features.dtype), wanted
    for actual, one in zip(run(features), expected, strict=True):
        assert_same(actual, one)


@pytest.fixture
def strips_of(interpreter, monkeypatch):
    """Makes the kernels cut maps into strips of so many rows; no test passes without the cuts."""
    cut = []

    def limit(rows):
        def blocks(maps, rois, vmem):
            del rois, vmem
            strips = -(-maps[2] // rows)
            cut.append(strips)
            return schedule.Blocks(strips, -(-maps[2] // strips), 128, 32)

        monkeypatch.setattr(schedule, "blocks", blocks)
        interpreted_tpu.forget()

    yield limit
    interpreted_tpu.forget()
    assert cut
    assert min(cut) > 1


def rois_with_an_image(height, width, count, images):
    rois = np.array(random_rois(count, height, width, images=images))
    rois[0] = [0, -2, -2, width + 2, height + 2]  # into every strip
    rois[1] = [images - 1, width, height, width + 5, height + 5]  # into none
    rois[2, 0] = images  # of no image
    rois[3] = [images - 1, 1, 0, 3, height - 1]
    return rois


@pytest.mark.parametrize("rows", (1, 3))
@pytest.mark.parametrize("convention", ("partition", "chainer"))
def test_rois_across_strips(rows, convention, strips_of):
    strips_of(rows)
    features = distinct_features((2, 8, 9, 2)) % 9  # with ties across strips
    check(features, rois_with_an_image(8, 9, 10, 2), (3, 2), convention)


def test_strips_of_bfloat16_with_nan(strips_of):
    strips_of(4)
    features = np.array(distinct_features((1, 14, 9, 2)) % 5, np.float32)
    features[np.random.default_rng(0).random(features.shape) < 0.02] = np.nan
    features[0, 5:8] = -np.inf
    check(jnp.asarray(features, jnp.bfloat16), random_rois(9, 14, 9, images=1), (2, 3))


def test_zeros_across_strips(strips_of):
    # Between strips, -0 stands for nothing; a zero of the map is not taken for it.
    strips_of(2)
    features = np.where(distinct_features((1, 8, 9, 2)) % 3 == 0, -0.0, -1.0).astype(np.float32)
    check(features, random_rois(5, 8, 9, images=1), (3, 3))


@interpreted
def test_images_that_share_packs():
    # Twenty RoIs, three packs, of five images in no order: most packs come to most images.
    features = distinct_features((5, 6, 7, 2))
    check(features, random_rois(20, 6, 7, images=5), (2, 2), "chainer")


@interpreted
def test_images_without_rois():
    features = distinct_features((5, 6, 7, 2))
    rois = np.array(random_rois(9, 6, 7, images=5))
    rois[:, 0] = [3, 1, 1, 3, 1, 3, 1, 3, 3]
    check(features, rois, (2, 2))


@interpreted
@pytest.mark.parametrize("output_size", ((9, 2), (17, 1), (1, 9)))
def test_more_rows_of_bins_than_a_vector_has(output_size):
    check(distinct_features((1, 21, 10, 2)), random_rois(3, 21, 10, images=1), output_size)


@interpreted
@pytest.mark.parametrize("channels", (128, 130, 384))
def test_blocks_of_channels(channels):
    check(distinct_features((1, 5, 40, channels)), random_rois(2, 5, 40, images=1), (2, 2))


@interpreted
def test_masked_rois_of_a_convention_with_empty_bins():
    features, mask = distinct_features((1, 6, 7, 2)), np.arange(9) % 3 > 0
    rois = np.array(random_rois(9, 6, 7, images=1))
    rois[::2, 1:] += 5  # bins beyond the map
    check(features, rois, (3, 3), "chainer", mask)


def test_the_benchmarks_maps_are_cut_as_little_as_can_be():
    def cut(features, dtype=jnp.float32):
        features = jax.ShapeDtypeStruct((1, *features), dtype)
        bins = jax.ShapeDtypeStruct((1, 8, 7, 7, features.shape[-1]), dtype)
        edges = jax.ShapeDtypeStruct((1, 8, 7), jnp.int32)
        rectangles = (jax.ShapeDtypeStruct((1, 8), jnp.int32), *[edges] * 4)
        return (
            pool_kernel.blocks(features, rectangles),
            scatter_kernel.blocks(bins, features.shape[1:4]),
        )

    for blocks in cut((1, 38, 50, 512)):
        assert (blocks.strips, blocks.channels) == (1, 256)
    for dtype in (jnp.float32, jnp.bfloat16):
        for blocks in cut((2, 200, 336, 256), dtype):
            assert blocks.channels == 128
            assert blocks.strips <= 16
            assert 0 <= blocks.strips * blocks.rows - 200 < blocks.strips


# The lists.


def lists(image_index, rows, images, height, strip_rows):
    strips = -(-height // strip_rows)
    blocks = schedule.Blocks(strips, strip_rows, 128, 32)
    image_index, rows = jnp.asarray(image_index, jnp.int32), jnp.asarray(rows, jnp.int32)
    ones = jnp.ones_like(rows[..., :1])
    edges = (rows[..., :1], rows[..., 1:], 0 * ones, ones)
    return schedule.work((image_index, *edges), images, blocks)


def packs_by_unit(work, group, units):
    offsets = np.asarray(work.offsets).reshape(-1, units + 1)[group]
    entries = np.asarray(work.entries)[group, 0]
    return [entries[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def test_a_pack_is_on_the_list_of_each_strip_that_it_reaches_into():
    image_index = np.repeat([[0, 1], [1, -1]], 8, axis=1)  # two groups of two packs
    image_index[0, 9] = 0
    rows = np.zeros((2, 16, 2))
    rows[0, :8], rows[0, 8:], rows[0, 9], rows[1, :8] = (3, 7), (0, 2), (8, 9), (9, 12)
    work = lists(image_index, rows, images=2, height=12, strip_rows=4)
    assert packs_by_unit(work, 0, 6) == [[0], [0], [1], [1], [], []]
    # The second pack of the second group has no image, and is written all the same.
    assert packs_by_unit(work, 1, 6) == [[1], [], [], [], [], [0]]
    # Image after image, strip after strip, of both groups.
    assert work.fetched.tolist() == [0, 1, 2, 3, 3, 3, 6, 6, 6, 6, 6, 11]


def test_nothing_is_fetched_before_the_first_strip_with_rois():
    work = lists(np.full((3, 8), -1), np.zeros((3, 8, 2)), images=1, height=4, strip_rows=4)
    assert work.fetched.tolist() == [0, 1, 2]  # each is written, if with nothing
    work = lists(np.ones((1, 8)), np.full((1, 8, 2), (0, 4)), images=3, height=4, strip_rows=4)
    assert work.fetched.tolist() == [1, 1, 1]
