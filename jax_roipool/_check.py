"""`python -m jax_roipool check`: every implementation on the device at hand, against NumPy."""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_roipool import _roi_pool
from jax_roipool._backends import problem_with
from jax_roipool._backends.rectangle_max import FAMILY
from jax_roipool._bins import CONVENTIONS, Convention

IN_ORDER = ("cpu", "cuda")  # whose sums are those of a loop over RoIs and bins, to the bit
SECONDS = 1.0  # of timing, or one call if that takes longer


class Problem(NamedTuple):
    """What to pool: RoIs of any kind, some without an image, over features of any kind."""

    features: tuple[int, int, int, int]
    rois: int
    output_size: tuple[int, int]
    dtype: str
    convention: str
    kind: str = "plain"

    def __str__(self) -> str:
        shape, size = (",".join(map(str, numbers)) for numbers in (self.features, self.output_size))
        return f"{self.dtype}[{shape}], {self.rois} RoIs, {size} bins, {self.convention}"


# Vectors of every width, tiles of every level, RoIs of which a warp lists the bins in several goes.
PROBLEMS = (
    Problem((2, 9, 11, 3), 40, (3, 3), "float32", "partition", "special"),
    Problem((1, 38, 50, 64), 30, (7, 7), "float32", "torchvision"),
    Problem((2, 64, 96, 20), 20, (2, 5), "float32", "openvino", "ties"),
    Problem((1, 200, 210, 8), 12, (1, 1), "float32", "chainer", "special"),
    Problem((1, 1, 60, 1), 9, (7, 7), "float32", "torchvision", "ties"),
    Problem((3, 17, 13, 200), 40, (7, 7), "bfloat16", "partition"),
    Problem((1, 64, 64, 16), 12, (2, 2), "bfloat16", "openvino", "special"),
    Problem((2, 23, 19, 13), 20, (3, 2), "float16", "chainer", "special"),
    Problem((2, 40, 33, 6), 20, (1, 2), "int8", "torchvision"),
    Problem((1, 30, 41, 4), 20, (4, 4), "uint16", "partition"),
)
TIMED = Problem((1, 38, 50, 512), 128, (7, 7), "float32", "torchvision")  # as VGG-16 trains


class Inputs(NamedTuple):
    """Arrays of a problem."""

    features: np.ndarray
    rois: np.ndarray
    cotangent: np.ndarray


def main(implementation: str | None = None) -> int:
    """Prints what it finds, of one implementation or all; 1 if one is wrong, or none was tried."""
    device, platform = jax.devices()[0], platform_of_devices()
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("jax_roipool", "jaxlib"))
    print(f"{', '.join(versions)}, {platform}: {device.device_kind}")
    wrong = tried = False
    for backend in FAMILY.backends:
        if backend.platforms is not None and platform not in backend.platforms:
            continue
        if implementation not in (None, backend.name):
            continue
        missing = problem_with(backend, [platform])
        if missing is not None:
            print(f"{backend.name}: not tried, {missing}")
            continue
        tried = True
        faults = [fault for problem in PROBLEMS for fault in faults_in(problem, backend.name)]
        for fault in faults:
            print(f"{backend.name}: WRONG, {fault}")
        wrong |= bool(faults)
        if not faults:
            print(
                f"{backend.name}: {len(PROBLEMS)} problems right to the bit; {times(backend.name)}"
            )
    if not tried:
        print(f"{implementation}: not tried, there is nothing of it on this platform")
    project = importlib.metadata.metadata("jax_roipool").get_all("Project-URL") or []
    place = next((url.split(", ")[1] for url in project if url.startswith("Issues")), "the project")
    print(f"Please report this, whatever it says: {place}")
    return int(wrong or not tried)


def platform_of_devices() -> str:
    """The default device's platform as programs are lowered for it: "cuda" or "rocm", not "gpu"."""
    names = ("cpu", "cuda", "rocm", "tpu")
    branches = {name: functools.partial(jnp.int32, i) for i, name in enumerate(names)}
    found = jax.jit(lambda: lax.platform_dependent(default=lambda: jnp.int32(-1), **branches))()
    return names[int(found)] if found >= 0 else jax.default_backend()


def faults_in(problem: Problem, implementation: str) -> Iterator[str]:
    """What is wrong with an implementation's answer to a problem."""
    inputs, all_expected = inputs_of(problem), expected(problem)
    try:
        got = [np.asarray(x) for x in answer(problem, implementation)(*inputs)]
    except Exception as error:  # whatever it is, the others can still be tried
        card = jax.devices()[0].device_kind
        says = f"{type(error).__name__}: {error}"
        yield f"{problem} on {card} fails; implementation='xla' does without it. {says:.1000}"
        return
    for name, actual, wanted in zip(NAMES, got, all_expected, strict=False):
        if name == "sums in order" and implementation not in IN_ORDER:
            continue
        equal = actual == wanted
        if np.issubdtype(wanted.dtype, np.floating):
            equal |= np.isnan(actual) & np.isnan(wanted)
        if not equal.all():
            at = tuple(map(int, np.argwhere(~equal)[0]))
            yield (
                f"{problem}: {name} differs in {np.sum(~equal)} of {equal.size} places, "
                f"first at {at}: {actual[at]} and not {wanted[at]}"
            )


NAMES = ("maxima", "maxima beside an argmax", "argmax", "gradient", "sums in order")


def answer(problem: Problem, implementation: str):
    """The library's, as one program. bfloat16 is widened, for NumPy to compare."""
    options: dict[str, Any] = {"convention": problem.convention, "implementation": implementation}

    def pool(features, rois):
        return _roi_pool.roi_pool(features, rois, problem.output_size, **options)

    @jax.jit
    def run(features, rois, cotangent):
        features = jnp.asarray(features, problem.dtype)
        both = _roi_pool.roi_pool_with_argmax(features, rois, problem.output_size, **options)
        if jnp.issubdtype(features.dtype, jnp.integer):
            return pool(features, rois), *both
        pooled, pullback = jax.vjp(lambda x: pool(x, rois), features)
        gradients = [pullback(g.astype(pooled.dtype))[0] for g in (jnp.round(cotangent), cotangent)]
        return tuple(_widened(x) for x in (pooled, *both, *gradients))

    return run


def times(implementation: str) -> str:
    """Milliseconds a call of ordinary size takes, waited for."""
    device_inputs = jax.device_put(inputs_of(TIMED))

    def pool(features, rois):
        return _roi_pool.roi_pool(
            features,
            rois,
            TIMED.output_size,
            convention="torchvision",
            implementation=implementation,
        )

    def both(features, rois, cotangent):
        pooled, pullback = jax.vjp(lambda x: pool(x, rois), features)
        return pooled, *pullback(cotangent)

    found = []
    for function, arguments in ((pool, device_inputs[:2]), (both, device_inputs)):
        run = jax.jit(function)
        jax.block_until_ready(run(*arguments))
        samples = []
        while sum(samples) < 1000 * SECONDS:
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            samples.append(1000 * (time.perf_counter() - start))
        found.append(statistics.median(samples))
    return "a call {:.3g} ms, with gradient {:.3g} ms ({})".format(*found, TIMED)


def inputs_of(problem: Problem) -> Inputs:
    """Features, flat RoIs and cotangents, the same every time."""
    rng = np.random.default_rng(0)
    images, height, width, _ = problem.features
    if problem.kind == "ties" or problem.dtype in ("int8", "uint16"):
        features = rng.integers(0, 5, problem.features).astype(np.float32)
    else:
        features = rng.standard_normal(problem.features).astype(np.float32)
    if problem.kind == "special":
        values = np.array([0.0, -0.0, np.inf, -np.inf, np.nan], np.float32)
        chosen = rng.integers(0, 40, problem.features)
        features = np.where(chosen < values.size, values[chosen % values.size], features)
    sizes = np.array([width, height])
    corners = rng.uniform(-3, 1, (problem.rois, 2)) + rng.uniform(0, 0.8, (problem.rois, 2)) * sizes
    ends = corners + rng.uniform(-0.1, 1.2, (problem.rois, 2)) * sizes
    index = rng.integers(-1, images + 1, (problem.rois, 1))  # of no image, some of them
    rois = np.concatenate([index, corners, ends], axis=1).astype(np.float32)
    shape = (problem.rois, *problem.output_size, problem.features[-1])
    cotangent = (3 * rng.standard_normal(shape)).astype(np.float32)
    return Inputs(features, rois, cotangent)


@functools.cache
def expected(problem: Problem) -> list[np.ndarray]:
    """The definition, bin after bin, in NumPy. Nothing here is shared with the library."""
    inputs = inputs_of(problem)
    dtype = jnp.dtype(problem.dtype)
    convention = CONVENTIONS[problem.convention]
    features = inputs.features.astype(dtype).astype(np.float64)  # exact, and compared as it is
    _, height, width, channels = features.shape
    rows, columns = problem.output_size
    lowest = jnp.iinfo(dtype).min if dtype.kind in "iu" else -np.inf
    pooled = np.zeros(inputs.cotangent.shape)
    argmax = np.full(pooled.shape, -1, np.int32)
    for r, (index, *coordinates) in enumerate(inputs.rois):
        if not 0 <= index < len(features):
            continue
        x1, y1, x2, y2 = (int(np.trunc(c + np.copysign(np.float32(0.5), c))) for c in coordinates)
        down = _bins_of(y1, y2, rows, height, convention)
        across = _bins_of(x1, x2, columns, width, convention)
        for (p, (top, end)), (q, (left, right)) in itertools.product(
            enumerate(down), enumerate(across)
        ):
            if top >= end or left >= right:
                pooled[r, p, q] = 0 if convention.empty_value == 0 else lowest
                continue
            cells = features[int(index), top:end, left:right].reshape(-1, channels)
            best = np.argmax(np.where(np.isnan(cells), np.inf, cells), axis=0)
            has_nan = np.isnan(cells).any(axis=0)
            best = np.where(has_nan, np.isnan(cells).argmax(axis=0), best)
            pooled[r, p, q] = cells[best, np.arange(channels)]
            row, column = np.divmod(best, right - left)
            argmax[r, p, q] = (top + row) * width + left + column
    pooled = pooled.astype(dtype)
    results = [pooled, pooled, argmax]
    if dtype.kind in "iu":
        return results
    own = np.nonzero(argmax >= 0)
    row, column = np.divmod(argmax[own], width)
    to = (inputs.rois[own[0], 0].astype(int), row, column, own[-1])
    for cotangent in (np.round(inputs.cotangent), inputs.cotangent):
        sums = np.zeros(features.shape, np.float32)
        np.add.at(sums, to, cotangent[own].astype(dtype).astype(np.float32))  # in order
        results.append(sums.astype(dtype))
    return [_widened(x) for x in results]


def _bins_of(start: int, end: int, bins: int, size: int, convention: Convention):
    """The rows, or columns, of each bin: the first, and the one after the last."""
    length = max(end - start + int(convention.inclusive_end), 1)
    for i in range(bins):
        if convention.overlapping_bins and convention.float32_edges:
            side = np.float32(length) / np.float32(bins)
            low, high = np.floor(np.float32(i) * side), np.ceil(np.float32(i + 1) * side)
        elif convention.overlapping_bins:
            low, high = i * length // bins, -(-(i + 1) * length // bins)
        else:
            low, high = i * length // bins, max(i * length // bins + 1, (i + 1) * length // bins)
        yield tuple(min(max(start + int(edge), 0), size) for edge in (low, high))


def _widened(array):
    return array.astype(np.float32) if array.dtype == jnp.bfloat16 else array
