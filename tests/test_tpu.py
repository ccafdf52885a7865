"""The TPU kernels' own seams, by the TPU interpreter: strips, packs, channels, lists.

The kernels are called as backends are. Programs are few, as the interpreter takes long to compile.
"""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import interpreted_tpu
import rectangle_oracle
from harness import assert_same, distinct_features, whole_cotangent
from jax_roipool._backends.rectangle_max import FAMILY, tpu
from jax_roipool._backends.rectangle_max.tpu import pool as pool_kernel
from jax_roipool._backends.rectangle_max.tpu import scatter as scatter_kernel
from jax_roipool._backends.rectangle_max.tpu import schedule


def interpreted(test):
    return pytest.mark.full(pytest.mark.usefixtures("interpreter")(test))


@pytest.fixture(scope="module", autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@functools.cache
def program(name, **statics):
    function = FAMILY.named(interpreted_tpu.NAME).functions[name]
    return jax.jit(functools.partial(function, **statics))


def check_maxima(features, edges, output_size, argmax_dtype=np.int32, empty_value=0.0):
    """By the oracle, the argmax of which is returned."""
    features = np.asarray(features)
    maxima, argmax = rectangle_oracle.rectangle_max(features, edges, output_size, empty_value)
    run = program(
        "rectangle_max",
        output_size=output_size,
        argmax_dtype=argmax_dtype and np.dtype(argmax_dtype),
        empty_value=empty_value,
    )
    results = run(features, edges)
    expected = [maxima, argmax.astype(argmax_dtype)] if argmax_dtype else [maxima]
    for actual, wanted in zip(results, expected, strict=True):
        assert_same(actual, wanted)
    return argmax


def check_sums(argmax, edges, map_shape, dtype=np.float32):
    """By the oracle; bad images get an argmax as well, which means nothing."""
    is_bad = (edges[..., 0] < 0) | (edges[..., 0] >= map_shape[0])
    argmax = np.where(is_bad[:, :, None, None, None], 3, argmax).astype(argmax.dtype)
    cotangent = np.asarray(whole_cotangent(argmax.shape, dtype=dtype))
    (sums,) = program("scatter_at_argmax", map_shape=map_shape)(cotangent, argmax, edges)
    assert_same(sums, rectangle_oracle.scatter_at_argmax(cotangent, argmax, edges, map_shape))


def check(features, edges, output_size, argmax_dtype=np.int32, empty_value=0.0):
    """The maxima, their argmax, and the sums at it."""
    argmax = check_maxima(features, edges, output_size, argmax_dtype, empty_value)
    check_sums(argmax.astype(argmax_dtype), edges, features.shape[1:4], features.dtype)


def bins(count, size, rng):
    """Starts and ends along an axis: bins that meet or overlap, some empty, on part of the map."""
    cuts = np.clip(np.sort(rng.integers(-2, size + 3, count + 1)), 0, size)
    overlap = rng.integers(0, 2, count) * (cuts[1:] > cuts[:-1])
    return [*cuts[:-1], *np.minimum(cuts[1:] + overlap, size)]


def random_edges(maps, num_rois, output_size):
    """Of maps `(G, n, H, W)`, with images in no order."""
    groups, images, height, width = maps
    rng = np.random.default_rng(0)
    rois = [
        [
            rng.integers(images),
            *bins(output_size[0], height, rng),
            *bins(output_size[1], width, rng),
        ]
        for _ in range(groups * num_rois)
    ]
    return np.array(rois, np.int32).reshape(groups, num_rois, -1)


# Strips.


@pytest.fixture
def strips_of(interpreter, monkeypatch):
    """Makes the kernels cut maps into strips of so many rows; no test passes without the cuts."""
    cut = []

    def limit(rows):
        def blocks(maps, num_rois, vmem):
            del num_rois, vmem
            strips = -(-maps[2] // rows)
            cut.append(strips)
            return schedule.Blocks(strips, -(-maps[2] // strips), 128, 32)

        monkeypatch.setattr(schedule, "blocks", blocks)
        forget()

    def forget():
        program.cache_clear()
        interpreted_tpu.forget()

    yield limit
    forget()
    assert cut
    assert min(cut) > 1


MAPS = (2, 7, 9)  # of each group


def edges_across_strips(groups):
    """For bins in three rows and two columns."""
    edges = random_edges((groups, *MAPS), 14, (3, 2))
    edges[:, 0] = [0, 0, 2, 5, 2, 5, 7, 0, 4, 5, 9]  # into every strip
    edges[:, 1] = [1, 7, 7, 7, 7, 7, 7, 9, 9, 9, 9]  # into none
    edges[:, 2, 0], edges[:, 9, 0] = 2, -1  # of no image
    edges[:, 3] = [1, 2, 4, 4, 5, 4, 4, 1, 4, 5, 4]  # an empty bin is last, the first reaches on
    return edges


def features_across_strips(groups, dtype):
    """A kind of values to a channel."""
    rng = np.random.default_rng(0)
    shape = (groups, *MAPS)
    kinds = (
        rng.integers(-2, 3, shape),  # ties
        np.broadcast_to(np.arange(MAPS[1])[:, None], shape),  # the last row has the maximum
        rng.choice([-0.0, -1.0], shape),  # between strips, -0 stands for nothing found yet
        rng.integers(-3, 4, shape) * 2.0**-133,  # subnormal, multiples of bfloat16's least
        rng.choice([np.nan, np.inf, -np.inf, 1.0], shape, p=[0.03, 0.12, 0.75, 0.1]),
        rng.choice([np.nan, -np.nan, -np.inf], shape),
    )
    return np.stack(kinds, axis=-1).astype(np.float32).astype(dtype)


@pytest.mark.parametrize(
    ("groups", "rows", "dtype", "argmax_dtype", "empty_value"),
    (
        (1, 2, np.float32, np.int32, 0.0),  # four strips
        (2, 4, jnp.bfloat16, np.int16, -np.inf),  # two
    ),
    ids=("2-float32", "4-bfloat16"),
)
@interpreted
def test_rois_across_strips(groups, rows, dtype, argmax_dtype, empty_value, strips_of):
    strips_of(rows)
    features = features_across_strips(groups, dtype)
    check(features, edges_across_strips(groups), (3, 2), argmax_dtype, empty_value)


@interpreted
def test_maxima_alone_across_strips(strips_of):
    strips_of(4)
    features, edges = features_across_strips(1, jnp.bfloat16), edges_across_strips(1)
    check_maxima(features, edges, (3, 2), None, -np.inf)


# Packs, bins and channels.


@interpreted
def test_images_that_share_packs_and_images_without_rois():
    # Twenty RoIs, three packs, of five images in no order: most packs come to most images.
    features = distinct_features((1, 5, 6, 7, 2))
    edges = random_edges((1, 5, 6, 7), 20, (2, 2))
    check(features, edges, (2, 2))
    edges[0, :, 0] = np.where(edges[0, :, 0] < 2, 1, 3)
    check_maxima(features, edges, (2, 2))


@interpreted
@pytest.mark.parametrize("output_size", ((17, 2), (1, 9)))
def test_more_rows_of_bins_than_a_vector_has(output_size):
    maps = (1, 1, 21, 10)
    check(distinct_features((*maps, 2)), random_edges(maps, 3, output_size), output_size)


@interpreted
@pytest.mark.parametrize("channels", (130, 384))
def test_blocks_of_channels(channels):
    maps = (1, 1, 5, 40)
    edges = random_edges(maps, 3, (2, 2))
    edges[0, 0] = [0, 0, 3, 3, 5, 0, 8, 9, 8]  # nine columns, if the last bin is empty
    check(distinct_features((*maps, channels)), edges, (2, 2))


def test_maxima_are_never_converted():
    # A conversion between bfloat16 and float32 may take a subnormal for zero.
    features, edges = jnp.zeros((1, 2, 5, 6, 2), jnp.bfloat16), jnp.zeros((1, 9, 9), jnp.int32)
    pool = functools.partial(
        tpu.rectangle_max, output_size=(2, 2), argmax_dtype=np.dtype(np.int16), empty_value=-np.inf
    )
    jaxpr = str(jax.make_jaxpr(pool)(features, edges))
    # Arrays, not the constants that arrays are padded with.
    converted_to = re.findall(r":(\w+)\[\d[\d,]*\] = convert_element_type", jaxpr)
    assert "i16" in converted_to  # the argmax, at least
    assert not {"bf16", "f32"}.intersection(converted_to)


def test_cotangents_are_widened_bit_by_bit():
    bits = np.arange(2**16, dtype=np.uint16)
    widened = jax.jit(scatter_kernel.as_float32)(bits.view(jnp.bfloat16))
    assert (np.asarray(widened).view(np.uint32) == bits.astype(np.uint32) << 16).all()


def test_the_benchmarks_maps_are_cut_as_little_as_can_be():
    def cut(features, dtype=jnp.float32):
        features = jax.ShapeDtypeStruct((1, *features), dtype)
        bins = jax.ShapeDtypeStruct((1, 8, 7, 7, features.shape[-1]), dtype)
        return (
            pool_kernel.blocks(features, 8, (7, 7)),
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

list_work = jax.jit(schedule.work, static_argnums=(1, 2, 3))


def lists(image_index, rows, images, height, strip_rows):
    """Of RoIs of one bin each, in the first column."""
    blocks = schedule.Blocks(-(-height // strip_rows), strip_rows, 128, 32)
    image_index, rows = np.asarray(image_index), np.asarray(rows)
    column = np.broadcast_to((0, 1), rows.shape)
    edges = np.concatenate([image_index[..., None], rows, column], axis=-1)
    return list_work(edges.astype(np.int32), (1, 1), images, blocks)


def packs_by_unit(work, group, units):
    offsets = np.asarray(work.offsets).reshape(-1, units + 1)[group]
    entries = np.asarray(work.entries)[group, 0]
    return [entries[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def test_a_pack_is_on_the_list_of_each_strip_that_it_reaches_into():
    image_index = np.repeat([[0, 1], [1, -1]], 8, axis=1)  # two groups of two packs
    image_index[0, 9] = 0
    rows = np.zeros((2, 16, 2), int)
    rows[0, :8], rows[0, 8:], rows[0, 9], rows[1, :8] = (3, 7), (0, 2), (8, 9), (9, 12)
    work = lists(image_index, rows, images=2, height=12, strip_rows=4)
    assert packs_by_unit(work, 0, 6) == [[0], [0], [1], [1], [], []]
    # The second pack of the second group has no image, and is written all the same.
    assert packs_by_unit(work, 1, 6) == [[1], [], [], [], [], [0]]
    # Image after image, strip after strip, of both groups.
    assert work.fetched.tolist() == [0, 1, 2, 3, 3, 3, 6, 6, 6, 6, 6, 11]


def test_a_bin_before_an_empty_one_counts_as_well():
    edges = np.array([[[0, 2, 4, 5, 4, 0, 1]]], np.int32)  # rows 2 to 4, then none
    work = list_work(edges, (2, 1), 1, schedule.Blocks(2, 4, 128, 32))
    assert packs_by_unit(work, 0, 2) == [[0], [0]]


def test_nothing_is_fetched_before_the_first_strip_with_rois():
    rows = np.zeros((3, 8, 2), int)
    work = lists(np.full((3, 8), -1), rows, images=1, height=4, strip_rows=4)
    assert work.fetched.tolist() == [0, 1, 2]  # each is written, if with nothing
    rows = np.full((1, 8, 2), (0, 4))
    work = lists(np.ones((1, 8), int), rows, images=3, height=4, strip_rows=4)
    assert work.fetched.tolist() == [1, 1, 1]
