"""The CUDA kernels themselves, emulated: every branch of them, and whatever edges say.

The contract is tested in `test_contract.py`. Here are the kernels that its problems do not need:
windows of every side, vectors of every width, numbers of 64 bits; sums in order; and edges,
argmaxes and image indices that nobody has promised anything of. All of it under the sanitizers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import emulated_cuda
import rectangle_oracle
from harness import assert_same, skip_unless_it_can_be_used, some_by_default
from jax_roipool._backends.rectangle_max.cuda import plans

INT16, INT32 = np.dtype(np.int16), np.dtype(np.int32)


@pytest.fixture(scope="module", autouse=True)
def _emulator():
    skip_unless_it_can_be_used(emulated_cuda.NAME)


class Case(NamedTuple):
    """A problem, and what the library would choose by its size."""

    problem: plans.Problem
    dtype: type
    argmax: np.dtype | None = INT32
    window: int = 0
    tiling: plans.Tiling = plans.FEW_CELLS
    empty: float = 0.0
    is_wide: bool = False  # numbers of 64 bits, although 32 would do

    def __str__(self):
        words = "x".join(map(str, self.problem)), np.dtype(self.dtype).name
        argmax = "none" if self.argmax is None else self.argmax.name
        wide = ("wide",) if self.is_wide else ()
        return "-".join((*words, argmax, f"window{self.window}", *wide))


Problem = plans.Problem
OTHER_TILING = plans.Tiling(3, 5, vector=2, in_registers=False, warps=2, at_once=3)
TILINGS = (plans.FEW_CELLS, plans.MANY_CELLS)
ROW = Problem(1, 1, 1, 60, 2, 5, 1, 7)
COLUMN = Problem(1, 2, 61, 1, 1, 5, 5, 1)
ODD = Problem(1, 2, 23, 37, 3, 9, 2, 1)
EVEN = Problem(2, 2, 32, 48, 4, 6, 1, 2)
MANY_CHANNELS = Problem(1, 2, 9, 14, 132, 5, 1, 3)
MANY_BINS = Problem(1, 1, 13, 6, 8, 40, 9, 11)
HALF_A_WARP = Problem(1, 1, 20, 11, 13, 35, 3, 2)
# Of the gradient, blocks of several warps, with more RoIs and bins than they list at once.
SEVERAL_WARPS = Problem(1, 1, 4, 5, 100, 700, 3, 3)
LARGE_ROWS = Problem(1, 1, 9, 8, 520, 3, 2, 7)  # each a block's several times over

CASES = (
    Case(SEVERAL_WARPS, np.float32, INT16),
    Case(SEVERAL_WARPS, jnp.bfloat16, INT32, tiling=plans.MANY_CELLS),
    Case(LARGE_ROWS, np.float32, INT16),
    Case(ODD, np.float32, INT16, window=8),
    Case(EVEN, np.float32, None, window=16, empty=-np.inf),
    Case(COLUMN, np.float64, INT32),
    Case(MANY_CHANNELS, np.float32, INT32, tiling=plans.MANY_CELLS),
    Case(MANY_BINS, jnp.bfloat16, INT16, window=2, tiling=OTHER_TILING),
    Case(HALF_A_WARP, np.float16, INT32, window=4, empty=-np.inf),
    Case(ODD, np.uint8, INT16, window=4),
    Case(ROW, np.float32, INT16),
    Case(COLUMN, np.int8, None, empty=-np.inf),
    Case(EVEN, np.float64, INT16, window=4, tiling=plans.MANY_CELLS),
    Case(EVEN, np.int8, INT32, window=16, empty=-np.inf),
    Case(EVEN, np.int64, INT16, window=2, empty=-np.inf),
    Case(EVEN, jnp.bfloat16, None, window=8),
    Case(ODD, np.float16, INT16, window=16, is_wide=True),
    Case(ODD, np.float32, INT32, window=4, tiling=OTHER_TILING, is_wide=True),
    Case(ODD, np.int16, INT32, window=2),
    Case(ODD, np.uint64, INT32, window=8, empty=-np.inf),
    Case(MANY_CHANNELS, jnp.bfloat16, INT16, window=2, tiling=OTHER_TILING),
    Case(MANY_CHANNELS, np.uint16, INT32, window=4),
    Case(MANY_CHANNELS, np.uint32, INT16, empty=-np.inf),
    Case(MANY_BINS, np.float32, INT32, empty=-np.inf),
    Case(MANY_BINS, np.int32, INT16, window=2),
    Case(HALF_A_WARP, jnp.bfloat16, INT16, tiling=plans.MANY_CELLS, is_wide=True),
    Case(HALF_A_WARP, np.float32, None, window=4),
)
with_cases = pytest.mark.parametrize("case", some_by_default(CASES, CASES[:8]), ids=str)
FLOATS = tuple(case for case in CASES if not rectangle_oracle.is_integer(case.dtype))
with_float_cases = pytest.mark.parametrize("case", some_by_default(FLOATS, FLOATS[:8]), ids=str)


def widened(kernel):
    """The kernel with numbers of 64 bits."""
    macros = dict(kernel.macros) | {"COUNT": "Long", "OFFSET": "Long"}
    return kernel._replace(macros=tuple(macros.items()))


def launch(case, kernel, results, *operands):
    kernel = widened(kernel) if case.is_wide else kernel
    return emulated_cuda.launch(kernel, results, *operands)


def pool(case, features, edges, windows_are_used=1):
    problem, dtype = case.problem, np.dtype(case.dtype)
    plan = plans.rectangle_max(
        problem, dtype, case.argmax, empty_is_least=case.empty < 0, window=case.window
    )
    dtypes = [dtype, *([] if case.argmax is None else [case.argmax])]
    operands = [features, edges]
    if case.window:
        used = np.array(windows_are_used, np.int32)
        shape = (problem.G, problem.n, *plan.windows, problem.C)
        dtypes_there = [dtype, *([] if case.argmax is None else [np.uint8])]
        windows = [jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes_there]
        operands += [used, *launch(case, plan.make_windows, windows, features, used)]
    shape = (problem.G, problem.K, problem.P, problem.Q, problem.C)
    results = [jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes]
    return launch(case, plan.pool, results, *operands)


def scatter(case, cotangent, argmax, edges):
    problem = case.problem
    kernel = plans.scatter_at_argmax(problem, cotangent.dtype, argmax.dtype, tiling=case.tiling)
    result = jax.ShapeDtypeStruct(problem[:5], cotangent.dtype)
    (gradient,) = launch(case, kernel, [result], cotangent, argmax, edges.swapaxes(1, 2))
    return gradient


def of_any_kind(problem, dtype, rng):
    """Features: ordinary ones, few values, any bits, the ends of the dtype, almost all -inf."""
    shape, dtype = problem[:5], np.dtype(dtype)
    kind = rng.integers(5)
    if kind == 0:
        return (10 * rng.standard_normal(shape)).astype(dtype)
    if kind == 1:
        return rng.integers(0, 3, shape).astype(dtype)
    if kind == 2:
        bits = rng.bytes(int(np.prod(shape)) * dtype.itemsize)
        return np.frombuffer(bits, dtype).reshape(shape)
    if rectangle_oracle.is_integer(dtype):
        info = np.iinfo(dtype)
        return rng.choice(np.array([info.min, info.max, 0, 1], dtype), shape)
    if kind == 3:
        tiny = float(jnp.finfo(dtype).smallest_subnormal)
        return rng.choice(np.array([0, -0.0, tiny, -tiny, 2 * tiny], dtype), shape)
    return rng.choice(np.array([-np.inf, -5, np.nan], dtype), shape, p=[0.9, 0.08, 0.02])


def bins_of_rois(problem, rng):
    """As RoIs have them, large and small, in the map and out of it."""
    edges = np.zeros((problem.G, problem.K, 1 + 2 * problem.P + 2 * problem.Q), np.int32)
    for g, k in np.ndindex(problem.G, problem.K):
        lanes = [rng.integers(-1, problem.n + 1)]
        for size, bins in ((problem.H, problem.P), (problem.W, problem.Q)):
            start = int(rng.integers(-size // 4, size))
            length = int(rng.integers(1, size + size // 2 + 1))
            cuts = start + np.arange(bins + 1) * length // bins
            ends = np.maximum(cuts[1:], cuts[:-1] + 1) + rng.integers(0, 2)
            lanes += [*np.clip(cuts[:-1], 0, size), *np.clip(ends, 0, size)]
        edges[g, k] = lanes
    return edges


def anything(problem, rng):
    """Edges and image indices without any order, and sometimes far out."""
    shape = (problem.G, problem.K, 1 + 2 * problem.P + 2 * problem.Q)
    near = rng.integers(-3, max(problem.H, problem.W) + 3, shape)
    near[..., 0] = rng.integers(-1, problem.n + 1, shape[:2])
    far = rng.integers(-(2**31), 2**31, shape)
    return np.where(rng.random(shape) < 0.1, far, near).astype(np.int32)


def kept_inside(edges, problem):
    """What an edge outside of the map comes to."""
    rows = slice(1, 1 + 2 * problem.P)
    columns = slice(1 + 2 * problem.P, None)
    edges = edges.copy()
    edges[..., rows] = edges[..., rows].clip(0, problem.H)
    edges[..., columns] = edges[..., columns].clip(0, problem.W)
    return edges


@with_cases
def test_maxima(case):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        features = of_any_kind(case.problem, case.dtype, rng)
        edges = (anything if seed % 3 == 2 else bins_of_rois)(case.problem, rng)
        maxima, argmax = rectangle_oracle.rectangle_max(
            features, kept_inside(edges, case.problem), case.problem[6:], case.empty
        )
        for windows_are_used in range(2 if case.window else 1):
            got, *cells = pool(case, features, edges, windows_are_used)
            for cell in cells:
                assert_same(cell, argmax.astype(case.argmax))
            assert_same(got, maxima)


@with_float_cases
def test_sums_are_in_the_order_of_rois_and_bins(case):
    """Bit for bit those of a loop, in float32, or in float64 of float64."""
    problem, sum_dtype = case.problem, np.float64 if case.dtype is np.float64 else np.float32
    for seed in range(4):
        rng = np.random.default_rng(seed)
        edges = bins_of_rois(problem, rng)
        features = rng.integers(0, 3, problem[:5]).astype(np.float32)
        _, argmax = rectangle_oracle.rectangle_max(features, edges, problem[6:], 0)
        argmax = argmax.astype(case.argmax or INT16)
        cotangent = rng.standard_normal(argmax.shape).astype(case.dtype)
        own, cells = rectangle_oracle.places(argmax, edges, problem[1:4])
        sums = np.zeros(problem[:5], sum_dtype)
        np.add.at(sums, cells, cotangent[own].astype(sum_dtype))  # one after the other
        assert_same(scatter(case, cotangent, argmax, edges), sums.astype(case.dtype))


def test_an_empty_bin_hides_no_other():
    """The last bin has no cell and ends where a tile begins, the one before has a cell in it."""
    problem = Problem(1, 1, 8, 8, 1, 1, 2, 1)
    edges = np.array([[[0, 0, 4, 5, 4, 0, 8]]], np.int32)
    argmax = np.array([4 * 8 + 3, -1], np.int16).reshape(1, 1, 2, 1, 1)
    cotangent = np.array([3, 7], np.float32).reshape(argmax.shape)
    gradient = scatter(Case(problem, np.float32, INT16), cotangent, argmax, edges)
    assert gradient[0, 0, 4, 3, 0] == gradient.sum() == 3


@with_float_cases
def test_no_argmax_and_no_edge_leads_outside(case):
    """Nothing is promised of the sums, but that the sanitizers have nothing to say."""
    problem, dtype = case.problem, case.argmax or INT16
    for seed in range(3):
        rng = np.random.default_rng(seed)
        shape = (problem.G, problem.K, problem.P, problem.Q, problem.C)
        argmax = rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype)
        near = rng.integers(-2, (problem.H + 4) * problem.W, shape, dtype)
        argmax = np.where(rng.random(shape) < 0.5, argmax, near)
        cotangent = np.ones(shape, case.dtype)
        edges = (bins_of_rois if seed == 1 else anything)(problem, rng)
        gradient = scatter(case, cotangent, argmax, edges)
        assert gradient.astype(np.float64).sum() <= cotangent.size


def test_the_emulator_reports_what_is_outside():
    """A kernel that is told of a larger map than it gets."""
    case = Case(ODD, np.float32)
    plan = plans.rectangle_max(
        case.problem._replace(H=30), np.dtype(case.dtype), None, empty_is_least=False, window=0
    )
    roi = [1, *(0, 30), *(30, 30), *(0, 37)]  # the last image, all rows in the first bin
    edges = np.broadcast_to(np.array(roi, np.int32), (1, 9, 7))
    shape = (1, 9, 2, 1, 3)
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        emulated_cuda.launch(
            plan.pool,
            [jax.ShapeDtypeStruct(shape, np.float32)],
            np.zeros(case.problem[:5], np.float32),
            edges,
        )


# Plans.


@pytest.mark.parametrize("channels", (1, 3, 4, 6, 13, 132, 200, 512))
@pytest.mark.parametrize("dtype", plans.ELEMENTS)
def test_vectors_divide_the_channels_and_are_loaded_at_once(dtype, channels):
    dtype = jnp.dtype(dtype)
    plan = plans.rectangle_max(
        Problem(1, 1, 9, 9, channels, 3, 2, 2), dtype, INT32, empty_is_least=False
    )
    vector = int(dict(plan.pool.macros)["VECTOR"])
    assert channels % vector == 0
    assert vector * dtype.itemsize in (1, 2, 4, 8, 16)
    assert vector * INT32.itemsize <= 32


def test_names_tell_kernels_apart():
    """XLA may mistake one text for another that lay at its address, but not one name."""
    kernels = [
        kernel
        for case in CASES
        for plan in [
            plans.rectangle_max(
                case.problem,
                np.dtype(case.dtype),
                case.argmax,
                empty_is_least=case.empty < 0,
                window=case.window,
            )
        ]
        for kernel in (
            plan.pool,
            plan.make_windows,
            plans.scatter_at_argmax(case.problem, np.dtype(case.dtype), INT32, tiling=case.tiling),
        )
        if kernel is not None
    ]
    assert len({kernel.name for kernel in kernels}) == len({k.macros for k in kernels})
    assert all(kernel.name.isidentifier() for kernel in kernels)


LARGE = Problem(1, 64, 256, 256, 256, 8, 7, 7)  # 2**32 bytes of float32


def test_offsets_have_64_bits_where_a_map_wants_them():
    float32 = np.dtype(np.float32)
    for side, offset in ((2**11 - 1, "int"), (2**11, "Long")):
        plan = plans.rectangle_max(
            LARGE._replace(H=side, W=2**11, C=512), float32, INT32, empty_is_least=False
        )
        assert dict(plan.pool.macros)["OFFSET"] == offset
        assert dict(plan.make_windows.macros)["OFFSET"] == offset


def test_counts_have_64_bits_where_the_bins_want_them():
    float32 = np.dtype(np.float32)
    for rois, count in ((2**20, "unsigned"), (2**27, "Long")):
        plan = plans.rectangle_max(
            LARGE._replace(K=rois, P=1, Q=1), float32, None, empty_is_least=False
        )
        assert dict(plan.pool.macros)["COUNT"] == count


@pytest.mark.parametrize(
    "problem",
    (
        pytest.param(LARGE._replace(K=2**20, P=64, Q=64), id="bins"),
        pytest.param(LARGE._replace(G=2**10, n=2**10), id="blocks"),
    ),
)
def test_what_has_no_kernel(problem):
    """Left to the portable backend."""
    assert plans.scatter_at_argmax(problem, np.dtype(np.float32), INT32) is None


def test_integers_have_no_gradient_kernel():
    assert plans.scatter_at_argmax(LARGE, np.dtype(np.int32), INT32) is None


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("dtype", (np.float32, np.float64, jnp.bfloat16))
def test_a_gradient_has_its_shared_memory_even_on_a_t4(tiling, dtype):
    """It has 64 KB, of which a kernel that asks for no more has 48."""
    kernel = plans.scatter_at_argmax(LARGE, np.dtype(dtype), INT32, tiling=tiling)
    macros = dict(kernel.macros)
    sums = tiling.rows * tiling.columns * int(macros["VECTOR"]) * kernel.threads
    sum_bytes = 8 if macros["SUM"] == "double" else 4
    lists = 4 * (2 * kernel.threads + 256)
    assert lists + (0 if tiling.in_registers else sums * sum_bytes) <= 40 * 1024


def test_large_rows_of_bins_are_shared_among_blocks():
    problem = Problem(1, 1, 64, 64, 512, 2, 1, 4096)
    plan = plans.rectangle_max(problem, np.dtype(np.float32), None, empty_is_least=False)
    items = int(dict(plan.pool.macros)["ITEMS"])
    assert items <= plans.MAX_ITEMS
    assert plan.pool.blocks * items >= 2 * 4096 * 512 // 4


def window_of(*sizes, rois=100):
    return plans.worthwhile_window(Problem(1, 1, *sizes[:2], 8, rois, *sizes[2:]))


def test_windows_are_made_where_bins_can_be_large_or_are_many():
    assert window_of(38, 50, 7, 7) == 0
    assert window_of(38, 50, 7, 7, rois=1000) == 2
    assert window_of(100, 168, 7, 7) == 4
    assert window_of(200, 336, 7, 7) == 4
    assert window_of(512, 512, 1, 1) == plans.LARGEST_WINDOW
    assert window_of(1, 2**14, 1, 7) == 0  # a row has no window
    assert window_of(7, 7, 7, 7, rois=1000) == 0  # nor has a bin of a cell
