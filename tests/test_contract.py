"""Every backend against the contract in the docstring of `jax_roipool._backends.rectangle_max`.

The backends' own functions are called, so what the library never asks of them counts as well. Few
programs, and much data through each: the oracle is `rectangle_oracle`.
"""

import functools
from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import at_once
import rectangle_oracle
from harness import assert_same, some_by_default
from jax_roipool._backends import rectangle_max as family


class Shape(NamedTuple):
    name: str
    groups: int
    images: int
    height: int
    width: int
    channels: int
    rois: int
    output_size: tuple[int, int]

    @property
    def features(self):
        return (self.groups, self.images, self.height, self.width, self.channels)

    @property
    def pooled(self):
        return (self.groups, self.rois, *self.output_size, self.channels)


TINY = Shape("tiny", 1, 1, 4, 5, 1, 8, (2, 3))
SMALL = Shape("small", 2, 3, 5, 9, 5, 6, (3, 2))
MIDDLE = Shape("middle", 2, 3, 11, 19, 5, 26, (3, 2))
STRIP = Shape("strip", 1, 2, 1, 9, 3, 11, (4, 7))  # more bins than cells, either way
BRIM = Shape("brim", 1, 1, 128, 256, 2, 16, (3, 2))  # int16 has an index for each cell, just so


class Program(NamedTuple):
    """A static configuration; `argmax` is the argmax's dtype."""

    shape: Shape
    dtype: type
    argmax: type | None
    empty_value: float = 0.0
    x64: bool = False

    def __str__(self):
        argmax = "none" if self.argmax is None else np.dtype(self.argmax).name
        words = (self.shape.name, np.dtype(self.dtype).name, argmax, f"{self.empty_value:g}")
        return "-".join((*words, "x64") if self.x64 else words)


INF = -np.inf
TINY_FLOAT32 = Program(TINY, np.float32, np.int32, INF)
MIDDLE_FLOAT64 = Program(MIDDLE, np.float64, np.int32, INF, x64=True)
BRIM_FLOAT32 = Program(BRIM, np.float32, np.int16, INF, x64=True)
SMALL_FLOAT32 = Program(SMALL, np.float32, np.int16)
SMALL_BFLOAT16 = Program(SMALL, jnp.bfloat16, np.int16, 0.0)
STRIP_FLOAT32 = Program(STRIP, np.float32, None, INF)
STRIP_BFLOAT16 = Program(STRIP, jnp.bfloat16, np.int32)
STRIP_FLOAT16 = Program(STRIP, np.float16, np.int32)

POOLING = (
    TINY_FLOAT32,
    Program(TINY, np.int16, np.int16, 0.0),
    Program(TINY, np.uint16, None, INF),
    Program(TINY, np.uint32, np.int32, 0.0),
    SMALL_BFLOAT16,
    STRIP_FLOAT32,
    Program(STRIP, np.int8, np.int16, INF),
    Program(STRIP, np.int64, np.int32, INF, x64=True),
    Program(STRIP, np.uint64, np.int16, 0.0, x64=True),
    MIDDLE_FLOAT64,
    Program(MIDDLE, np.float16, None, INF),
    Program(MIDDLE, np.int32, np.int16, INF),
    Program(MIDDLE, np.uint8, np.int32, INF),
    BRIM_FLOAT32,
)
MOVING = (
    TINY_FLOAT32,
    SMALL_FLOAT32,
    STRIP_BFLOAT16,
    STRIP_FLOAT16,
    MIDDLE_FLOAT64,
    BRIM_FLOAT32,
)
# What the interpreter of TPU kernels, which takes a second a call, has to do with.
POOLING_IN_ALL = (TINY_FLOAT32, SMALL_BFLOAT16, STRIP_FLOAT32)
MOVING_IN_ALL = (TINY_FLOAT32, SMALL_FLOAT32, STRIP_BFLOAT16)


@pytest.fixture(scope="module", autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@functools.cache
def compiled(implementation, function, **statics):
    run = family.FAMILY.named(implementation).functions[function]

    @jax.jit
    def checked(*arrays):
        results = run(*arrays, **statics)
        assert isinstance(results, list)
        return results

    return checked


def call(implementation, function, program, *arrays, **statics):
    """What a backend's function returns, as NumPy arrays."""
    with jax.enable_x64(program.x64):
        return list(map(np.asarray, compiled(implementation, function, **statics)(*arrays)))


def pool(implementation, program, features, edges):
    """The maxima and, if the program has one, their argmax."""
    return call(
        implementation,
        "rectangle_max",
        program,
        features,
        edges,
        output_size=program.shape.output_size,
        argmax_dtype=program.argmax and np.dtype(program.argmax),
        empty_value=program.empty_value,
    )


def assert_pools(implementation, program, features, edges):
    results = pool(implementation, program, features, edges)
    maxima, argmax = rectangle_oracle.rectangle_max(
        features, edges, program.shape.output_size, program.empty_value
    )
    expected = [maxima] if program.argmax is None else [maxima, argmax.astype(program.argmax)]
    assert len(results) == len(expected)
    # The argmax first, which says more when both are wrong.
    for actual, wanted in zip(reversed(results), reversed(expected), strict=True):
        assert_same(actual, wanted)


def gather(implementation, program, features, argmax, edges):
    (gathered,) = call(implementation, "gather_at_argmax", program, features, argmax, edges)
    return gathered


def scatter(implementation, program, cotangent, argmax, edges):
    map_shape = program.shape.features[1:4]
    (gradient,) = call(
        implementation,
        "scatter_at_argmax",
        program,
        cotangent,
        argmax,
        edges,
        map_shape=map_shape,
    )
    return gradient


# Rectangles. Along an axis: the starts and the ends of the bins of one RoI.


def meeting(bins, size, rng):
    cuts = np.sort(rng.integers(0, size + 1, bins + 1))
    return cuts[:-1], cuts[1:]


def covering(bins, size, rng):
    """As even as can be, from border to border."""
    cuts = np.arange(bins + 1) * size // bins
    return cuts[:-1], cuts[1:]


def overlapping(bins, size, rng):
    """Every bin has a cell of the next one, which may have no other."""
    cuts = np.sort(rng.integers(0, size, bins + 1))
    return cuts[:-1], cuts[1:] + 1


def overlapping_at_times(bins, size, rng):
    cuts = np.sort(rng.integers(0, size + 1, bins + 1))
    return cuts[:-1], np.minimum(cuts[1:] + rng.integers(0, 2, bins), size)


def one_cell_repeated(bins, size, rng):
    cell = rng.integers(0, size)
    return np.full(bins, cell), np.full(bins, cell + 1)


def cell_after_cell(bins, size, rng):
    cuts = np.minimum(np.arange(bins + 1) + rng.integers(-bins, size), size)
    cuts = np.maximum(cuts, 0)
    return cuts[:-1], cuts[1:]


def all_in_the_first(bins, size, rng):
    cuts = np.append(0, np.full(bins, size))
    return cuts[:-1], cuts[1:]


def all_in_the_last(bins, size, rng):
    cuts = np.append(np.zeros(bins, int), size)
    return cuts[:-1], cuts[1:]


def all_then_its_last_cell(bins, size, rng):
    return np.append(0, np.full(bins - 1, size - 1)), np.full(bins, size)


def first_cell_then_all(bins, size, rng):
    return np.zeros(bins, int), np.append(np.ones(bins - 1, int), size)


def empty_at_both_ends(bins, size, rng):
    cuts = np.clip(np.sort(rng.integers(-size, 2 * size, bins + 1)), 0, size)
    return cuts[:-1], cuts[1:]


def before_the_map(bins, size, rng):
    return np.zeros(bins, int), np.zeros(bins, int)


def after_the_map(bins, size, rng):
    return np.full(bins, size), np.full(bins, size)


def empty_inside(bins, size, rng):
    cuts = np.sort(rng.integers(0, size + 1, bins))
    return cuts, cuts


def anything(bins, size, rng):
    """All that the contract allows: behind an empty bin the next one can be far away."""
    starts, ends = [], []
    start = rng.integers(0, size + 1)
    for _ in range(bins):
        starts.append(start)
        if start == size or rng.random() < 0.3:
            ends.append(start)
            start = rng.integers(start, size + 1)
        else:
            ends.append(rng.integers(start + 1, size + 1))
            start = ends[-1] - rng.integers(0, 2)
    return np.array(starts), np.array(ends)


AXES = (
    meeting,
    covering,
    overlapping,
    overlapping_at_times,
    one_cell_repeated,
    cell_after_cell,
    all_in_the_first,
    all_in_the_last,
    all_then_its_last_cell,
    first_cell_then_all,
    empty_at_both_ends,
    before_the_map,
    after_the_map,
    empty_inside,
    anything,
)


def bad_images(images):
    return np.array([-1, images, images + 1, -images, 2**31 - 1, -(2**31)])


def rectangles(shape, seed, rows=None, columns=None):
    """The edges: one of the kinds above along each axis or, where none is given, all of them."""
    rng = np.random.default_rng(seed)
    down, across = shape.output_size
    # Steps that share no factor with the number of kinds: each kind has its turn.
    row_kinds = [rows] if rows else [AXES[(seed + 2 * i) % len(AXES)] for i in range(len(AXES))]
    column_kinds = (
        [columns] if columns else [AXES[(7 * seed + 4 * i) % len(AXES)] for i in range(len(AXES))]
    )
    edges = np.zeros((shape.groups, shape.rois, 1 + 2 * down + 2 * across), np.int32)
    for turn, (g, k) in enumerate(np.ndindex(shape.groups, shape.rois)):
        image = rng.integers(0, shape.images)
        if rng.random() < 0.15:
            image = rng.choice(bad_images(shape.images))
        row_edges = row_kinds[turn % len(row_kinds)](down, shape.height, rng)
        column_edges = column_kinds[turn % len(column_kinds)](across, shape.width, rng)
        edges[g, k] = np.concatenate([[image], *row_edges, *column_edges])
    return edges


def bins_of(edges, shape):
    """The starts and ends along each axis, `[..., 2, bins]`."""
    down, across = shape.output_size
    _, rows, columns = np.split(edges.astype(np.int64), [1, 1 + 2 * down], axis=-1)
    return rows.reshape(*rows.shape[:-1], 2, down), columns.reshape(*rows.shape[:-1], 2, across)


@pytest.mark.parametrize("kind", AXES, ids=lambda kind: kind.__name__)
def test_the_rectangles_here_are_those_of_the_contract(kind):
    for seed in range(5):
        for shape in (TINY, SMALL, MIDDLE, STRIP, BRIM):
            edges = rectangles(shape, seed, rows=kind, columns=kind)
            rows, columns = bins_of(edges, shape)
            for axis, size in ((rows, shape.height), (columns, shape.width)):
                starts, ends = axis[..., 0, :], axis[..., 1, :]
                assert (starts >= 0).all()
                assert (ends >= starts).all()
                assert (ends <= size).all()
                assert (np.diff(starts) >= 0).all()
                into_the_next = ends[..., :-1] - starts[..., 1:]
                is_empty = (ends == starts)[..., :-1]
                assert (is_empty | (into_the_next == 0) | (into_the_next == 1)).all()


# Features.


def unsigned(dtype):
    return np.dtype(f"uint{8 * np.dtype(dtype).itemsize}")


def any_bits(dtype, shape, rng):
    """Every bit pattern is as likely as any other."""
    bits = unsigned(dtype)
    return rng.integers(0, np.iinfo(bits).max, shape, bits, endpoint=True).view(dtype)


def nans(dtype, shape, rng):
    """NaNs of either sign and of any payload, those that signal among them."""
    info, bits = jnp.finfo(dtype), unsigned(dtype)
    payload = any_bits(bits, shape, rng) % bits.type(2**info.nmant - 1) + bits.type(1)
    sign = any_bits(bits, shape, rng) & bits.type(1 << (info.bits - 1))
    infinity = np.array(np.inf, dtype).view(bits)
    return (payload | sign | infinity).view(dtype)


def from_pool(pool, chances=None):
    def values(dtype, shape, rng):
        array = np.array(pool, np.dtype(dtype))
        total = None if chances is None else np.divide(chances, np.sum(chances))
        return rng.choice(array, shape, p=total)

    return values


def wide(dtype, shape, rng):
    """Of every magnitude, and in wide dtypes all different."""
    values = any_bits(dtype, shape, rng)
    if rectangle_oracle.is_integer(dtype):
        return values
    with np.errstate(invalid="ignore"):  # NaNs that signal
        return np.where(np.isfinite(values), values, np.array(-1, dtype))


def equal(dtype, shape, rng):
    return np.full(shape, 3, dtype)


def lowest(dtype, shape, rng):
    """What an empty rectangle may give; here it has a cell."""
    return np.full(shape, rectangle_oracle.of_empty(dtype, INF), dtype)


def lowest_mostly(dtype, shape, rng):
    if rectangle_oracle.is_integer(dtype):
        next_one = np.iinfo(dtype).min + 1
    else:
        next_one = jnp.finfo(dtype).min
    return np.where(rng.random(shape) < 0.05, np.array(next_one, dtype), lowest(dtype, shape, rng))


def subnormals(dtype, shape, rng):
    """Numbers that a comparison of a processor that flushes subnormals takes for zeros."""
    step, normal = (np.float64(x) for x in smallest(dtype))
    pool = [-normal, -normal + step, -2 * step, -step, -0.0, 0.0, step, 2 * step, normal - step]
    values = from_pool(pool, [20, 20, 20, 20, 2, 2, 1, 1, 1])(np.float64, shape, rng)
    # Where the larger ones are too rare to be in every rectangle, the smaller ones win.
    return values.astype(dtype)


def smallest(dtype):
    """The smallest positive number and the smallest normal one."""
    return np.array(1, unsigned(dtype)).view(dtype), jnp.finfo(dtype).tiny


def adjacent(dtype, shape, rng):
    """Neighbours: what rounds them on the way to a comparison confuses them."""
    if rectangle_oracle.is_integer(dtype):
        top = np.iinfo(dtype).max
        return (top - rng.integers(0, 3, shape).astype(dtype)).astype(dtype)
    one = np.array(1, dtype).view(unsigned(dtype))
    return (one + rng.integers(0, 3, shape).astype(one.dtype)).view(dtype)


def extreme(dtype, shape, rng):
    """Around both ends and around each power of two."""
    info = np.iinfo(dtype)
    powers = [sign * 2**e + d for e in range(info.bits) for d in (-1, 0, 1) for sign in (-1, 1)]
    pool = [info.min, info.min + 1, info.max - 1, info.max, *powers]
    return from_pool([x for x in pool if info.min <= x <= info.max])(dtype, shape, rng)


def one_nan(dtype, shape, rng):
    """One NaN in each channel of a map, among infinities."""
    values = from_pool((np.inf, 1, 2, -np.inf))(dtype, shape, rng)
    for g, n, c in np.ndindex(shape[0], shape[1], shape[4]):
        cell = rng.integers(0, shape[2]), rng.integers(0, shape[3])
        values[(g, n, *cell, c)] = nans(dtype, (), rng)[()]
    return values


def some_nans(dtype, shape, rng):
    values = from_pool((np.inf, -np.inf, 0.0, -0.0, 1, -1))(dtype, shape, rng)
    return np.where(rng.random(shape) < 0.15, nans(dtype, shape, rng), values)


FOR_ALL = {
    "wide": wide,
    "ties": from_pool((0, 1, 2, 3)),
    "equal": equal,
    "lowest": lowest,
    "lowest_mostly": lowest_mostly,
    "adjacent": adjacent,
}
FOR_FLOATS = {
    **FOR_ALL,
    "negative": from_pool((-4, -3, -2, -1)),
    "zeros": from_pool((0.0, -0.0)),
    "zeros_among_negative": from_pool((0.0, -0.0, -1), (1, 1, 8)),
    "subnormals": subnormals,
    "infinite": from_pool((np.inf, -np.inf, 5), (1, 10, 2)),
    "one_nan": one_nan,
    "some_nans": some_nans,
    "all_nan": nans,
}
FOR_INTEGERS = {**FOR_ALL, "extreme": extreme}


def with_values(programs):
    """Each program with each of the kinds of its dtype."""
    return pytest.mark.parametrize(
        ("program", "kind"),
        tuple(
            pytest.param(program, kind, id=f"{program}-{kind}")
            for program in programs
            for kind in (FOR_INTEGERS if rectangle_oracle.is_integer(program.dtype) else FOR_FLOATS)
        ),
    )


def values(kind, program, seed):
    kinds = {**FOR_FLOATS, **FOR_INTEGERS}
    array = kinds[kind](program.dtype, program.shape.features, np.random.default_rng(seed))
    assert array.dtype == program.dtype
    assert array.shape == program.shape.features
    return array


def of_every_kind(program, seed):
    """Each channel of each map of a kind of its own."""
    kinds = tuple(FOR_FLOATS.values())
    rng = np.random.default_rng(seed)
    features = np.empty(program.shape.features, program.dtype)
    groups, images, height, width, channels = features.shape
    for turn, (g, n, c) in enumerate(np.ndindex(groups, images, channels), 5 * seed):
        kind = kinds[turn % len(kinds)]
        shape = (1, 1, height, width, 1)
        features[g, n, :, :, c] = kind(program.dtype, shape, rng)[0, 0, :, :, 0]
    return features


def with_programs(programs):
    return pytest.mark.parametrize("program", programs, ids=str)


def with_the_small_program(programs):
    """That one, and with `--full` all of them: for what the interpreter takes part in."""
    return with_programs(some_by_default(programs, (SMALL_BFLOAT16, SMALL_FLOAT32)))


def with_axes(function):
    return pytest.mark.parametrize("kind", AXES, ids=lambda kind: kind.__name__)(function)


# The maxima.


@with_the_small_program(POOLING_IN_ALL)
def test_maxima_of_every_kind_at_once(every_implementation, program):
    for seed in range(2):
        features = of_every_kind(program, seed)
        assert_pools(every_implementation, program, features, rectangles(program.shape, seed))


@with_values(POOLING)
def test_maxima(implementation, program, kind):
    for seed in range(2):
        edges = rectangles(program.shape, seed)
        assert_pools(implementation, program, values(kind, program, seed), edges)


@with_axes
@with_programs((*POOLING_IN_ALL, MIDDLE_FLOAT64, BRIM_FLOAT32))
def test_kinds_of_rectangles(implementation, program, kind):
    for seed, name in enumerate(("ties", "equal", "wide", "some_nans")):
        features = values(name, program, seed)
        for edges in (
            rectangles(program.shape, seed, rows=kind),
            rectangles(program.shape, seed, columns=kind),
        ):
            assert_pools(implementation, program, features, edges)


@pytest.mark.parametrize("argmax", (np.int16, None), ids=("argmax", "none"))
def test_windows_of_cells(argmax):
    """Bins that have room for windows, and end before the map does."""
    program = Program(MIDDLE, np.float32, argmax, INF)
    for seed, kind in enumerate(AXES):
        features = of_every_kind(program, seed)
        for edges in (
            rectangles(program.shape, seed, rows=kind),
            rectangles(program.shape, seed, columns=kind),
        ):
            assert_pools(at_once.NAME, program, features, edges)


@st.composite
def drawn_edges(draw, shape):
    def axis(bins, size):
        starts, ends = [], []
        low, high = 0, size
        for _ in range(bins):
            starts.append(draw(st.integers(low, high)))
            ends.append(draw(st.integers(starts[-1], size)))
            # Behind an empty bin anywhere, or else where this one ends or a cell before.
            is_empty = starts[-1] == ends[-1]
            low, high = (starts[-1], size) if is_empty else (ends[-1] - 1, ends[-1])
        return starts + ends

    down, across = shape.output_size
    images = st.sampled_from([*range(shape.images), *bad_images(shape.images).tolist()])
    rois = [
        [draw(images), *axis(down, shape.height), *axis(across, shape.width)]
        for _ in range(shape.groups * shape.rois)
    ]
    return np.array(rois, np.int32).reshape(shape.groups, shape.rois, -1)


@hypothesis.given(data=st.data())
def test_shrinking_examples(implementation, data):
    program = TINY_FLOAT32
    edges = data.draw(drawn_edges(program.shape))
    cell = st.sampled_from((0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, np.nan, np.inf, -np.inf))
    count = int(np.prod(program.shape.features))
    features = data.draw(st.lists(cell, min_size=count, max_size=count))
    features = np.array(features, np.float32).reshape(program.shape.features)
    assert_pools(implementation, program, features, edges)


@with_programs((TINY_FLOAT32, BRIM_FLOAT32))
def test_the_argmax_has_the_maximum(implementation, program):
    """Gathering at the argmax gives the maxima, except where it is -1."""
    features = values("some_nans", program, 0)
    edges = rectangles(program.shape, 3)
    maxima, argmax = pool(implementation, program, features, edges)
    gathered = gather(implementation, program, features, argmax, edges)
    assert (argmax >= 0).any()
    assert_same(gathered, np.where(argmax < 0, np.zeros((), program.dtype), maxima))


def test_the_last_cell_of_the_largest_map_of_int16(implementation):
    program = BRIM_FLOAT32
    features = np.zeros(program.shape.features, np.float32)
    features[:, :, -1, -1] = 1
    edges = rectangles(program.shape, 0, rows=all_in_the_last, columns=all_in_the_last)
    edges[..., 0] = 0
    _, argmax = pool(implementation, program, features, edges)
    assert argmax.max() == 2**15 - 1
    assert_pools(implementation, program, features, edges)


# Image indices outside of the group.


@pytest.mark.parametrize("position", range(6))
@with_programs(POOLING_IN_ALL)
def test_bad_images_pool_to_zero(implementation, program, position):
    """Zero, whatever an empty rectangle gives."""
    features = np.full(program.shape.features, 7, program.dtype)
    edges = rectangles(program.shape, 5)
    edges[..., 0] = bad_images(program.shape.images)[position]
    maxima, *argmax = pool(implementation, program, features, edges)
    assert (maxima == 0).all()
    assert all((array == -1).all() for array in argmax)


def in_no_order(shape, seed):
    """Every other RoI has a bad image, and edges that are in the map but no bins."""
    rng = np.random.default_rng(seed)
    edges = rectangles(shape, seed)
    rows = 2 * shape.output_size[0]
    for k in range(0, shape.rois, 2):
        edges[:, k, 0] = rng.choice(bad_images(shape.images), shape.groups)
        edges[:, k, 1:] = rng.integers(0, shape.width + 1, edges[:, k, 1:].shape)
        edges[:, k, 1 : 1 + rows] %= shape.height + 1
    return edges


@with_the_small_program(POOLING_IN_ALL)
def test_bad_images_whatever_the_edges(every_implementation, program):
    features = values("ties", program, 0)
    assert_pools(every_implementation, program, features, in_no_order(program.shape, 0))


# Gathering and scattering.


def cells_of_maxima(edges, program, seed):
    """An argmax such as the library has: of some features, with ties or all different."""
    kind = ("ties", "wide")[seed % 2]
    features = FOR_FLOATS[kind](np.float32, program.shape.features, np.random.default_rng(seed))
    _, argmax = rectangle_oracle.rectangle_max(features, edges, program.shape.output_size, 0)
    return argmax.astype(program.argmax)


def whole_cotangent(program, seed, largest=8):
    rng = np.random.default_rng(seed)
    return rng.integers(-largest, largest + 1, program.shape.pooled).astype(program.dtype)


def assert_gathers(implementation, program, features, argmax, edges):
    expected = rectangle_oracle.gather_at_argmax(features, argmax, edges)
    assert_same(gather(implementation, program, features, argmax, edges), expected)


def assert_scatters(implementation, program, cotangent, argmax, edges):
    expected = rectangle_oracle.scatter_at_argmax(
        cotangent, argmax, edges, program.shape.features[1:4]
    )
    assert_same(scatter(implementation, program, cotangent, argmax, edges), expected)


# NaN and infinities where nothing reads them must not be felt: no multiplying by zero.
@pytest.mark.parametrize("kind", ("wide", "subnormals", "some_nans", "infinite"))
@with_programs(MOVING)
def test_gather(implementation, program, kind):
    for seed in range(3):
        edges = rectangles(program.shape, seed)
        argmax = cells_of_maxima(edges, program, seed)
        features = values(kind, program, seed)
        assert_gathers(implementation, program, features, argmax, edges)


@with_the_small_program(MOVING_IN_ALL)
def test_gather_and_scatter(every_implementation, program):
    edges = rectangles(program.shape, 0)
    argmax = cells_of_maxima(edges, program, 0)
    features = values("ties", program, 0)
    assert_gathers(every_implementation, program, features, argmax, edges)
    assert_scatters(every_implementation, program, whole_cotangent(program, 0), argmax, edges)


@with_axes
@with_programs(MOVING)
def test_scatter(implementation, program, kind):
    for seed, axis in enumerate(("rows", "columns")):
        edges = rectangles(program.shape, seed, **{axis: kind})
        argmax = cells_of_maxima(edges, program, seed)
        cotangent = whole_cotangent(program, seed)
        assert_scatters(implementation, program, cotangent, argmax, edges)


@with_the_small_program(MOVING_IN_ALL)
def test_scatter_of_values_that_are_not_finite(every_implementation, program):
    """They stay where their argmax sends them, and those without one go nowhere."""
    for seed in range(2):
        edges = rectangles(program.shape, seed)
        argmax = cells_of_maxima(edges, program, seed)
        cotangent = whole_cotangent(program, seed)
        choice = np.random.default_rng(seed).random(cotangent.shape)
        cotangent[(choice < 0.1) | ((argmax < 0) & (choice < 0.5))] = np.nan
        cotangent[(choice > 0.9) | ((argmax < 0) & (choice > 0.5))] = np.inf
        assert_scatters(every_implementation, program, cotangent, argmax, edges)


@with_programs(MOVING)
def test_scatter_without_an_argmax(implementation, program):
    edges = rectangles(program.shape, 0, rows=covering, columns=covering)
    argmax = np.full(program.shape.pooled, -1, program.argmax)
    cotangent = np.full(argmax.shape, np.nan, program.dtype)
    gradient = scatter(implementation, program, cotangent, argmax, edges)
    assert gradient.dtype == program.dtype
    assert (gradient == 0).all()


@pytest.mark.parametrize("position", range(6))
@with_programs(MOVING_IN_ALL)
def test_bad_images_are_not_moved_from_or_to(implementation, program, position):
    """Although the argmax is a cell of its rectangle."""
    edges = rectangles(program.shape, 0, rows=covering, columns=overlapping)
    argmax = cells_of_maxima(edges, program, 0)
    edges[..., 0] = bad_images(program.shape.images)[position]
    assert (argmax > 0).any()
    features = np.full(program.shape.features, 7, program.dtype)
    assert (gather(implementation, program, features, argmax, edges) == 0).all()
    cotangent = np.ones(argmax.shape, program.dtype)
    assert (scatter(implementation, program, cotangent, argmax, edges) == 0).all()


@with_the_small_program(MOVING_IN_ALL)
def test_bad_images_are_not_moved_from_or_to_whatever_the_edges(every_implementation, program):
    """The argmax is a cell of the rectangle that the RoI has with a good image."""
    argmax = cells_of_maxima(rectangles(program.shape, 0), program, 0)
    edges = in_no_order(program.shape, 0)
    features = values("ties", program, 0)
    assert_gathers(every_implementation, program, features, argmax, edges)
    assert_scatters(every_implementation, program, whole_cotangent(program, 0), argmax, edges)


# Sums.


def all_to_one_cell(program, cell):
    """Edges and argmax of bins that all have this one cell, and no other."""
    edges = rectangles(program.shape, 0)
    down, across = program.shape.output_size
    edges[..., 0] = program.shape.images - 1
    for first, count, index in ((1, down, cell[0]), (1 + 2 * down, across, cell[1])):
        edges[..., first : first + count] = index
        edges[..., first + count : first + 2 * count] = index + 1
    index = cell[0] * program.shape.width + cell[1]
    return edges, np.full(program.shape.pooled, index, program.argmax)


@with_programs((STRIP_BFLOAT16, STRIP_FLOAT16))
def test_sums_are_as_exact_as_float32(implementation, program):
    """In bfloat16 a sum of ones sticks at 256, in float16 at 2048."""
    edges, argmax = all_to_one_cell(program, (0, 4))
    cotangent = np.ones(program.shape.pooled, program.dtype)
    cotangent.reshape(-1, program.shape.channels)[300:] = 0
    for first in (1, 256, 2048):
        cotangent[0, 0, 0, 0] = first
        gradient = scatter(implementation, program, cotangent, argmax, edges)
        expected = np.zeros(program.shape.features, np.float64)
        expected[0, -1, 0, 4] = first + 299
        assert_same(gradient, expected.astype(program.dtype))


@with_programs((STRIP_BFLOAT16, STRIP_FLOAT16))
def test_sums_may_be_out_of_range_on_the_way(implementation, program):
    """Twice 60000 is infinite in float16; and a one beside it would be lost in bfloat16."""
    edges, argmax = all_to_one_cell(program, (0, 0))
    cotangent = np.zeros(program.shape.pooled, program.dtype)
    large = np.array(59904, program.dtype)  # a number in each dtype
    for signs in ((1, 1, 0, -1, -1), (1, -1, 0, 1, -1), (-1, -1, 0, 1, 1)):
        for place, sign in enumerate(signs):
            cotangent[0, place, place % 4, place] = (
                sign * large if sign else np.array(1, program.dtype)
            )
        gradient = scatter(implementation, program, cotangent, argmax, edges)
        assert gradient[0, -1, 0, 0].tolist() == [1] * program.shape.channels
        assert np.count_nonzero(gradient) == program.shape.channels


def test_float64_is_summed_in_float64(implementation):
    """Sums that float32 has no room for."""
    program = MIDDLE_FLOAT64
    edges = rectangles(program.shape, 0, rows=one_cell_repeated, columns=overlapping)
    argmax = cells_of_maxima(edges, program, 0)
    cotangent = whole_cotangent(program, 0, largest=2**40)
    assert_scatters(implementation, program, cotangent, argmax, edges)


# Runs and sizes.


@with_programs(MOVING)
def test_every_run_has_the_same_bits(implementation, program):
    if jax.default_backend() == "gpu" and implementation in ("blocks", "segment_max"):
        pytest.skip("XLA's scatter on a GPU has no fixed order")
    edges = rectangles(program.shape, 0, rows=overlapping, columns=one_cell_repeated)
    argmax = cells_of_maxima(edges, program, 0)
    rng = np.random.default_rng(0)
    cotangent = rng.standard_normal(program.shape.pooled).astype(program.dtype)
    runs = {scatter(implementation, program, cotangent, argmax, edges).tobytes() for _ in range(10)}
    assert len(runs) == 1


@pytest.mark.parametrize("axis", ("groups", "images", "channels", "rois", "rows", "columns"))
def test_axes_of_size_0(every_implementation, axis):
    shape = SMALL
    if axis == "rows":
        shape = shape._replace(output_size=(0, 2))
    elif axis == "columns":
        shape = shape._replace(output_size=(3, 0))
    else:
        shape = shape._replace(**{axis: 0})
    program = Program(shape, np.float32, np.int16, INF)
    backend = family.FAMILY.named(every_implementation).functions
    down, across = shape.output_size
    # Every index is outside of no images.
    edges = np.zeros((shape.groups, shape.rois, 1 + 2 * down + 2 * across), np.int32)
    edges[..., 1 + down : 1 + 2 * down] = edges[..., 1 + 2 * down + across :] = 1
    features = np.ones(shape.features, np.float32)
    argmax = np.zeros(shape.pooled, np.int16)
    cotangent = np.ones(shape.pooled, np.float32)

    @jax.jit  # one program for all three
    def run(features, edges, argmax, cotangent):
        return (
            backend["rectangle_max"](
                features,
                edges,
                output_size=shape.output_size,
                argmax_dtype=np.dtype(np.int16),
                empty_value=INF,
            ),
            backend["gather_at_argmax"](features, argmax, edges),
            backend["scatter_at_argmax"](cotangent, argmax, edges, map_shape=shape.features[1:4]),
        )

    (maxima, cells), (gathered,), (gradient,) = run(features, edges, argmax, cotangent)
    for array, dtype, value in (
        (maxima, np.float32, 0),
        (cells, np.int16, -1),
        (gathered, np.float32, 0),
    ):
        assert array.dtype == dtype
        assert array.shape == program.shape.pooled
        assert (np.asarray(array) == value).all()
    assert gradient.dtype == np.float32
    assert gradient.shape == shape.features
    assert not np.asarray(gradient).any()
