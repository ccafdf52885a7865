"""Every backend against the contract in the docstring of `jax_roipool._backends.weighted_sum`.

The backends' own functions are called, with cells and weights that no operator makes.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import at_once
from harness import as_numpy, assert_same, assert_same_sums, skip_unless_it_can_be_used
from jax_roipool._backends.weighted_sum import FAMILY


class Shape(NamedTuple):
    name: str
    features: tuple[int, ...]  # G, n, H, W, C
    rois: int
    bins: tuple[int, int]
    taps: tuple[int, int]
    run: tuple[int, int]

    @property
    def weights(self):
        lead = self.features[0], self.rois
        return tuple((*lead, *axis) for axis in zip(self.bins, self.taps, strict=True))


SAMPLES = Shape("samples", (2, 3, 5, 9, 3), 26, (3, 2), (4, 2), (2, 2))
RUNS = Shape("runs", (2, 2, 11, 7, 3), 21, (2, 3), (11, 7), (11, 7))
MIXED = Shape("mixed", (1, 2, 6, 8, 2), 15, (1, 2), (6, 3), (2, 1))
# Many vectors of channels, single ones, and channels that fill none.
WIDE = Shape("wide", (1, 2, 5, 6, 149), 9, (2, 2), (4, 4), (2, 2))
NAMES = ("weighted_sum", "weighted_scatter", "row_weights", "column_weights")


class Problem(NamedTuple):
    features: np.ndarray
    pooled: np.ndarray
    cells: np.ndarray
    rows: np.ndarray
    columns: np.ndarray


@functools.cache
def problem(shape):
    """Cells far outside, images that are not there, and weights that are 0 or negative."""
    rng = np.random.default_rng(0)
    (G, n, H, W, C), K = shape.features, shape.rois
    image = rng.integers(-1, n + 1, (G, K, 1))
    image[0, :2, 0] = -(2**31), 2**31 - 1
    cells, weights, counts = [], [], []
    for size, axis, run in zip((H, W), shape.weights, shape.run, strict=True):
        _, _, bins, taps = axis
        first = rng.integers(-2, size + 2, (G, K, bins * (taps // run)))
        first[rng.random(first.shape) < 0.05] = 2**31 - 1 - run
        first[rng.random(first.shape) < 0.05] = -(2**31)
        cells.append(first)
        count = rng.integers(0, taps + 2, (G, K, 1))
        weight = rng.normal(size=axis) * (rng.random(axis) < 0.7)
        weights.append(np.where(np.arange(taps) < count[..., None], weight, 0).astype(np.float32))
        counts.append(count)
    cells = np.concatenate([image, *counts, *cells], axis=-1).astype(np.int32)
    return Problem(
        rng.normal(size=shape.features).astype(np.float32),
        rng.normal(size=(G, K, *shape.bins, C)).astype(np.float32),
        cells,
        *weights,
    )


def terms(shape, cells):
    """Each tap of a RoI that has an image: g, k, p, t, q, v, and the cell."""
    (G, n, H, W, _), K = shape.features, shape.rois
    (P, Q), (T, V), (r, s) = shape.bins, shape.taps, shape.run
    S, U = T // r, V // s
    for g, k in np.ndindex(G, K):
        image, _, _, *first = map(int, cells[g, k])
        if not 0 <= image < n:
            continue
        for p, t, q, v in np.ndindex(P, T, Q, V):
            y = first[p * S + t // r] + t % r
            x = first[P * S + q * U + v // s] + v % s
            yield g, k, p, t, q, v, image, min(max(y, 0), H - 1), min(max(x, 0), W - 1)


def definition(shape, features, pooled, cells, rows, columns):
    """The four results, float64, by the names of the functions that give them."""
    features, pooled, rows, columns = (
        as_numpy(x).astype(float) for x in (features, pooled, rows, columns)
    )
    results = {
        "weighted_sum": np.zeros_like(pooled),
        "weighted_scatter": np.zeros_like(features),
        "row_weights": np.zeros_like(rows),
        "column_weights": np.zeros_like(columns),
    }
    for g, k, p, t, q, v, *cell in terms(shape, cells):
        at, row, column = (g, *cell), rows[g, k, p, t], columns[g, k, q, v]
        if row != 0 and column != 0:
            results["weighted_sum"][g, k, p, q] += row * column * features[at]
            results["weighted_scatter"][at] += row * column * pooled[g, k, p, q]
        product = pooled[g, k, p, q] @ features[at]
        if column != 0:
            results["row_weights"][g, k, p, t] += column * product
        if row != 0:
            results["column_weights"][g, k, q, v] += row * product
    return results


@functools.cache
def expected(shape, dtype=np.float32):
    """What the definition gives, and the same of absolute values."""
    arrays = problem(shape)
    narrow = [np.asarray(jnp.asarray(x, dtype)) for x in arrays[:2]]
    sizes = [np.abs(as_numpy(x)) for x in (*narrow, *arrays[3:])]
    return (
        definition(shape, *narrow, *arrays[2:]),
        definition(shape, *sizes[:2], arrays.cells, *sizes[2:]),
    )


BACKENDS = ("cpu", "gather", "matmul")


@functools.cache
def compiled(backend, name, shape):
    if backend == "cpu":
        skip_unless_it_can_be_used("cpu")
    function = FAMILY.named(backend).functions[name]
    of_name = {
        "weighted_scatter": {"map_shape": shape.features[1:4]},
        "row_weights": {"taps": shape.taps[:1]},
        "column_weights": {"taps": shape.taps[1:]},
    }
    options = {"run": shape.run, **of_name.get(name, {})}

    @jax.jit
    def run(features, pooled, cells, rows, columns):
        operands = {
            "weighted_sum": (features, cells, rows, columns),
            "weighted_scatter": (pooled, cells, rows, columns),
            "row_weights": (features, pooled, cells, columns),
            "column_weights": (features, pooled, cells, rows),
        }
        (result,) = function(*operands[name], **options)
        return result

    return run


def check(backend, name, shape, dtype=np.float32):
    arrays = problem(shape)
    features, pooled = (jnp.asarray(x, dtype) for x in arrays[:2])
    actual = compiled(backend, name, shape)(features, pooled, *arrays[2:])
    wanted, sizes = (x[name] for x in expected(shape, dtype))
    assert actual.dtype == (dtype if name.startswith("weighted") else np.float32)
    terms = math.prod(shape.taps) * math.prod(shape.bins) * shape.rois
    eps = jnp.finfo(actual.dtype).eps + terms**0.5 * 2.0**-23
    if name.endswith("weights"):  # those of taps that are not to be read are left open
        count = arrays.cells[:, :, 1 + (name == "column_weights"), None, None]
        read = np.arange(actual.shape[-1]) < count
        actual, wanted = (np.where(read, as_numpy(x), 0) for x in (actual, wanted))
    assert (np.abs(as_numpy(actual) - wanted) <= eps * sizes + 1e-30).all()
    assert np.abs(wanted).max() > 0.1


CASES = [
    *((backend, shape, np.float32) for backend in ("cpu", "gather") for shape in (SAMPLES, RUNS)),
    *(("cpu", WIDE, dtype) for dtype in (np.float32, jnp.bfloat16, np.float16)),
    (at_once.AVERAGE_NAME, RUNS, np.float32),
    ("matmul", SAMPLES, np.float32),
    *(
        pytest.param(backend, shape, dtype, marks=pytest.mark.full)
        for backend, shape, dtype in (
            *((backend, MIXED, jnp.bfloat16) for backend in ("gather", at_once.AVERAGE_NAME)),
            (at_once.AVERAGE_NAME, SAMPLES, np.float16),
            ("matmul", RUNS, np.float32),
            ("matmul", MIXED, jnp.bfloat16),
        )
    ),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("backend", "shape", "dtype"),
    CASES,
    ids=lambda value: getattr(value, "name", None) or getattr(value, "__name__", None) or value,
)
def test_the_contract(backend, shape, dtype, name):
    check(backend, name, shape, dtype)


@pytest.mark.parametrize("dtype", (jnp.bfloat16, np.float16))
@np.errstate(over="ignore")
def test_sums_of_narrow_floats_are_rounded_once(dtype):
    """To the nearest, of two to the even one: subnormals, infinities and ties included."""
    arrays = problem(WIDE)
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 16, (2, *arrays.features.shape), np.uint16)
    size = 2.0 ** rng.integers(-26, 17, arrays.features.shape)
    some = (bits[0] & 0x8FFF).view(dtype), (size * arrays.features).astype(dtype)
    features = np.where(bits[1] % 4 == 0, *some)
    ones = np.ones_like(arrays.rows), np.ones_like(arrays.columns)
    for weights in (arrays[3:], ones, (ones[0] / 2, ones[1])):
        run = compiled("cpu", "weighted_sum", WIDE)
        operands = arrays.pooled, arrays.cells, *weights
        wanted = np.asarray(run(features.astype(np.float32), *operands)).astype(dtype)
        assert_same(run(features, *operands), wanted)
    assert 0.05 < (np.abs(wanted.astype(np.float32)) < 2.0**-15).mean() < 0.95


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("backend", BACKENDS)
def test_cells_without_weight_are_not_seen(backend, bad):
    arrays = problem(SAMPLES)
    ones = np.ones_like(arrays.pooled), arrays.cells, np.abs(arrays.rows), np.abs(arrays.columns)
    touched = definition(SAMPLES, arrays.features, *ones)["weighted_scatter"] > 0
    features = np.where(touched, arrays.features, np.float32(bad))
    assert not np.isfinite(features).all()
    run = compiled(backend, "weighted_sum", SAMPLES)
    wanted = np.asarray(run(*arrays))
    actual = np.asarray(run(features, *arrays[1:]))
    np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cells_with_weight_are(backend):
    arrays = problem(SAMPLES)
    rng = np.random.default_rng(1)
    kind = rng.random(arrays.features.shape)
    features = np.where(kind < 0.03, np.nan, arrays.features)
    features = np.where((kind >= 0.03) & (kind < 0.1), np.inf, features).astype(np.float32)
    features[..., 0] = np.where(kind[..., 0] > 0.95, -np.inf, arrays.features[..., 0])
    weights = np.abs(arrays.rows), np.abs(arrays.columns)
    with np.errstate(invalid="ignore"):
        wanted = definition(SAMPLES, features, *arrays[1:3], *weights)["weighted_sum"]
    run = compiled(backend, "weighted_sum", SAMPLES)
    actual = np.asarray(run(features, *arrays[1:3], *weights))
    np.testing.assert_array_equal(np.isfinite(actual), np.isfinite(wanted))
    assert np.isnan(actual[np.isnan(wanted)]).all()
    assert 0.1 < np.isfinite(wanted).mean() < 0.97


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_cotangents_without_an_image_go_nowhere(backend, name):
    arrays = problem(SAMPLES)
    n = SAMPLES.features[1]
    has_image = (arrays.cells[..., :1] >= 0) & (arrays.cells[..., :1] < n)
    pooled = np.where(has_image[..., None, None], arrays.pooled, np.nan)
    run = compiled(backend, name, SAMPLES)
    assert_same_sums(run(arrays.features, pooled, *arrays[2:]), run(*arrays))


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_the_same_from_run_to_run(backend):
    if jax.default_backend() == "gpu" and backend == "gather":
        pytest.skip("XLA's scatter on a GPU has no fixed order")
    shape = SAMPLES if backend == "matmul" else RUNS
    run, arrays = compiled(backend, "weighted_scatter", shape), problem(shape)
    first = np.asarray(run(*arrays))
    for _ in range(5):
        np.testing.assert_array_equal(run(*arrays), first)


EMPTY = (
    Shape("no rois", (2, 1, 3, 4, 2), 0, (2, 2), (4, 4), (2, 2)),
    Shape("no images", (2, 0, 3, 4, 2), 3, (2, 2), (4, 4), (2, 2)),
    Shape("no groups", (0, 1, 3, 4, 2), 3, (2, 2), (4, 4), (2, 2)),
    Shape("no channels", (2, 1, 3, 4, 0), 3, (2, 2), (4, 4), (2, 2)),
)


@pytest.mark.parametrize("shape", EMPTY, ids=lambda shape: shape.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_axes_of_size_0(backend, shape):
    G, K, (P, Q) = shape.features[0], shape.rois, shape.bins
    runs = sum(b * t // r for b, t, r in zip(shape.bins, shape.taps, shape.run, strict=True))
    arrays = (
        np.ones(shape.features, np.float32),
        np.ones((G, K, P, Q, shape.features[-1]), np.float32),
        np.zeros((G, K, 3 + runs), np.int32),
        *(np.ones(x, np.float32) for x in shape.weights),
    )
    for name, like in zip(NAMES, (arrays[1], arrays[0], *arrays[3:]), strict=True):
        result = compiled(backend, name, shape)(*arrays)
        assert result.shape == like.shape
        assert not np.asarray(result).any()
