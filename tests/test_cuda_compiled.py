"""Programs for CUDA, by XLA's own compiler for an H100 and without one: loops, scatters, memory."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_roipool
from compiled import COLLECTIVES, WORKLOADS
from cuda_compiler import Compiled, mesh, on_the_gpu
from jax_roipool import CONVENTIONS
from jax_roipool._backends.rectangle_max.cuda import nvrtc
from jax_roipool._bins import packed_edges
from jax_roipool._rois import canonical_rois

pytestmark = pytest.mark.full

PORTABLE = ("blocks", "dense", "segment_max")
DTYPES = (jnp.float32, jnp.bfloat16)
ids = {"ids": lambda dtype: jnp.dtype(dtype).name}


def compiled(implementation, features, rois, dtype=jnp.float32, output_size=7, gradient=False):
    arguments = on_the_gpu(features, dtype), on_the_gpu((rois, 5), jnp.float32)

    def pool(features, rois):
        return jax_roipool.roi_pool(features, rois, output_size, implementation=implementation)

    def both(features, rois, cotangent):
        pooled, pullback = jax.vjp(lambda features: pool(features, rois), features)
        return pooled, *pullback(cotangent)

    if gradient:
        cotangent = on_the_gpu((rois, output_size, output_size, features[-1]), dtype)
        return Compiled(both, *arguments, cotangent)
    return Compiled(pool, *arguments)


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("workload", ("vgg-train", "fpn-p2"))
@pytest.mark.parametrize(
    ("implementation", "loops", "scatters"),
    (
        pytest.param("blocks", 1, 0, id="blocks"),
        pytest.param("segment_max", 1, 2, id="segment_max"),  # chunks of RoIs; rows, and columns
        pytest.param("dense", 1, 0, id="dense"),
    ),
)
def test_forward(implementation, loops, scatters, workload, dtype):
    program = compiled(implementation, *WORKLOADS[workload], dtype)
    assert (program.count("while"), program.count("scatter")) == (loops, scatters)


@pytest.mark.parametrize("workload", ("vgg-train", "fpn-p2"))
@pytest.mark.parametrize(
    ("implementation", "loops", "scatters"),
    (
        pytest.param("blocks", 2, 1, id="blocks"),  # maxima, and where they are
        # Two for the maxima, two for their cells, and the gradient.
        pytest.param("segment_max", 1, 5, id="segment_max"),
        pytest.param("dense", 2, 0, id="dense"),
    ),
)
def test_both_passes(implementation, loops, scatters, workload):
    program = compiled(implementation, *WORKLOADS[workload], gradient=True)
    assert (program.count("while"), program.count("scatter")) == (loops, scatters)


@pytest.mark.parametrize("implementation", PORTABLE)
def test_the_gradient_is_sorted_only_where_xla_is_told_to_fix_its_order(implementation):
    assert compiled(implementation, *WORKLOADS["vgg-train"], gradient=True).count("sort") == 0


@pytest.mark.parametrize("gradient", (False, True), ids=("forward", "both passes"))
def test_few_launches(gradient):
    """Beside the loops; a step of a loop is one fusion, a counter and a condition."""
    program = compiled("blocks", *WORKLOADS["vgg-train"], gradient=gradient)
    entry = program.text[program.text.index("\nENTRY") :]
    assert entry.count(" fusion(") + entry.count(" custom-call(") <= (24 if gradient else 12)
    assert program.count("conditional", "sort", "custom-call") == 0


@pytest.mark.parametrize("argmax", (False, True), ids=("forward", "both passes"))
@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("workload", ("vgg-train", "fpn-p2"))
def test_temporary_memory_of_the_blocks(workload, dtype, argmax):
    (images, height, width, channels), rois = WORKLOADS[workload]
    itemsize = jnp.dtype(dtype).itemsize
    index = (2 if height * width <= 2**15 else 4) if argmax else 0
    cells, bins = images * height * width * channels, rois * 7 * 7 * channels
    # Keys, windows, and both after each other; bins before and after a step, and as features.
    sums = 4 * cells if argmax else 0
    bound = 4 * cells * (itemsize + index) + bins * (3 * itemsize + (12 if argmax else 0)) + sums
    program = compiled("blocks", *WORKLOADS[workload], dtype, gradient=argmax)
    assert program.temporary_bytes < bound


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_edges_are_two_launches_at_most(convention):
    """Of rounding, scaling and clipping: what stands beside a kernel."""

    def edges(rois, spatial_scale, roi_mask):
        cells = canonical_rois(rois, None, roi_mask, spatial_scale, images=1)
        return packed_edges(*cells, (7, 7), (38, 50), CONVENTIONS[convention])

    program = Compiled(
        edges,
        on_the_gpu((1000, 5), jnp.float32),
        on_the_gpu((), jnp.float32),
        on_the_gpu((1000,), jnp.bool_),
    )
    assert program.text[program.text.index("\nENTRY") :].count(" fusion(") <= 2


# The kernels: the alarm, should XLA no longer know the call, or make something else of it.


@pytest.fixture
def kernels():
    if problem := nvrtc.problem():
        pytest.skip(problem)


def launches(program):
    """Kernels of ours, and of XLA's own."""
    entry = program.text[program.text.index("\nENTRY") :]
    return entry.count(" custom-call("), entry.count(" fusion(")


NOTHING_ELSE = ("while", "scatter", "sort", "conditional", "gather")


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize(
    ("workload", "calls"), (("vgg-train", 1), ("vgg-infer", 2), ("fpn", 2), ("fpn-p2", 2))
)
def test_kernels(kernels, workload, calls, dtype):
    """Where bins are large or many, windows are made first; the gradient is one launch more."""
    (images, height, width, channels), rois = WORKLOADS[workload]
    bins = rois * 7 * 7 * channels
    index = 2 if height * width <= 2**15 else 4
    windows = 0 if calls == 1 else images * height * width * channels
    for gradient in (False, True):
        program = compiled("cuda", *WORKLOADS[workload], dtype, gradient=gradient)
        ours, xlas = launches(program)
        assert ours == calls + gradient
        # The edges, by RoI and by lane, and whether windows pay.
        assert xlas <= (1 if calls == 1 else 4) + gradient
        assert program.count(*NOTHING_ELSE) == 0
        edges = rois * (1 + 4 * 7) * 4
        itemsize = jnp.dtype(dtype).itemsize
        bound = windows * (itemsize + gradient) + bins * index * gradient + 3 * edges
        assert program.temporary_bytes <= bound + 2**20


@pytest.mark.parametrize("channels", (1, 3, 13, 200))
def test_kernels_of_any_channels(kernels, channels):
    program = compiled("cuda", (2, 38, 50, channels), 1000, gradient=True)
    assert launches(program)[0] == 3
    assert program.count(*NOTHING_ELSE) == 0


def test_kernels_of_a_map_beyond_2_to_the_31_bytes(kernels):
    program = compiled("cuda", (2, 1024, 1024, 1024), 64, gradient=True)
    assert launches(program)[0] == 3
    assert program.count(*NOTHING_ELSE) == 0


def test_kernels_under_transformations(kernels):
    """`vmap` of a gradient is two launches; a second derivative is two, and XLA's gather."""
    maps, rois = on_the_gpu((4, 38, 50, 256)), on_the_gpu((4, 64, 4))

    def loss(features, rois):
        return (jax_roipool.roi_pool(features, rois, 7, implementation="cuda") ** 2).sum()

    program = Compiled(jax.vmap(jax.grad(loss)), maps, rois)
    assert launches(program)[0] == 2
    assert program.count(*NOTHING_ELSE) == 0

    def product(features, rois, direction):
        gradient = jax.grad(lambda x: jax.vmap(loss)(x, rois).sum())
        return jax.grad(lambda x: (gradient(x) * direction).sum())(features)

    program = Compiled(product, maps, rois, maps)
    assert launches(program)[0] <= 4
    assert program.count("while", "scatter", "sort") == 0


def test_kernels_in_a_loop(kernels):
    """One call in its body, of the slices that the loop takes."""

    def loop(features, rois):
        def step(total, item):
            pooled = jax_roipool.roi_pool(*item, 7, implementation="cuda")
            return total + pooled.sum(), None

        return jax.lax.scan(step, jnp.float32(0), (features, rois))[0]

    program = Compiled(loop, on_the_gpu((5, 19, 25, 64)), on_the_gpu((5, 32, 4)))
    assert program.count("while") == 1
    assert program.count("custom-call") == 1


MAPS, ROIS = (8, 38, 50, 512), (8, 64, 4)


@pytest.mark.parametrize("implementation", (None, "cuda"))
@pytest.mark.parametrize("kind", (AxisType.Explicit, AxisType.Auto))
@pytest.mark.parametrize(
    ("features", "rois", "pooled", "moves"),
    (
        pytest.param(P("x"), P("x"), P("x"), 0, id="batch"),
        pytest.param(
            P(None, None, None, "x"), P(), P(None, None, None, None, "x"), 0, id="channels"
        ),
        pytest.param(P(), P(None, "x"), P(None, "x"), 1, id="rois"),
    ),
)
def test_four_gpus_move_nothing_but_the_sum_over_rois(
    features, rois, pooled, moves, kind, implementation, monkeypatch
):
    if implementation == "cuda" and (problem := nvrtc.problem()):
        pytest.skip(problem)
    monkeypatch.setattr(jax, "device_count", lambda: 4)  # as where there are four
    devices = mesh(kind)
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(devices, spec))
        for shape, spec in ((MAPS, features), (ROIS, rois), ((8, 64, 7, 7, 512), pooled))
    ]

    def both(features, rois, cotangent):
        def pool(features):
            return jax_roipool.roi_pool(features, rois, 7, implementation=implementation)

        pooled, pullback = jax.vjp(pool, features)
        return pooled, *pullback(cotangent)

    jax.clear_caches()
    program = Compiled(both, *arguments)
    assert program.count("custom-call") >= (2 if implementation == "cuda" else 0)
    assert program.count("all-reduce") == program.count(*COLLECTIVES) == moves
