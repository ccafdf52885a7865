"""Programs for CUDA, by XLA's own compiler for an H100 and without one: loops, scatters, memory."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_roipool
from compiled import COLLECTIVES, WORKLOADS
from cuda_compiler import Compiled, mesh, on_the_gpu
from jax_roipool._backends import table

PORTABLE = ("xla", "table", "dense")
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


def entry(program):
    """The text of the program without what it calls: loops, branches, fusions."""
    return program.text[program.text.index("\nENTRY") :]


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("workload", ("vgg-train", "fpn-p2"))
@pytest.mark.parametrize(
    ("implementation", "loops", "scatters"),
    (
        pytest.param("xla", 1, 2, id="xla"),  # chunks of RoIs; rows and columns of bins
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
        # Two for the maxima, two for their cells, and the gradient.
        pytest.param("xla", 1, 5, id="xla"),
        pytest.param("dense", 2, 0, id="dense"),
    ),
)
def test_both_passes(implementation, loops, scatters, workload):
    program = compiled(implementation, *WORKLOADS[workload], gradient=True)
    assert (program.count("while"), program.count("scatter")) == (loops, scatters)


@pytest.mark.parametrize("implementation", PORTABLE)
def test_the_gradient_is_sorted_only_where_xla_is_told_to_fix_its_order(implementation):
    assert compiled(implementation, *WORKLOADS["vgg-train"], gradient=True).count("sort") == 0


def test_the_table_takes_one_loop_over_its_blocks_and_no_scatter():
    # One bin: windows reach everywhere, and nothing is left to `xla`.
    program = compiled("table", *WORKLOADS["vgg-train"], output_size=1)
    assert (program.count("while"), program.count("scatter", "conditional")) == (1, 0)
    program = compiled("table", *WORKLOADS["vgg-train"], output_size=1, gradient=True)
    assert (program.count("while"), program.count("scatter")) == (1, 1)


def test_a_table_that_fits_takes_no_loop(monkeypatch):
    monkeypatch.setattr(table, "TABLE_BYTES", 1 << 30)
    program = compiled("table", *WORKLOADS["vgg-train"], output_size=1)
    assert program.count("while", "scatter", "conditional") == 0


@pytest.mark.parametrize("workload", ("vgg-train", "fpn-p2"))
def test_the_table_leaves_larger_bins_to_one_branch(workload):
    program = compiled("table", *WORKLOADS[workload])
    assert program.count("conditional") == 1
    assert " while(" not in entry(program)
    assert " scatter(" not in entry(program)


@pytest.mark.parametrize("argmax", (False, True), ids=("forward", "both passes"))
@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_temporary_memory_of_the_table(workload, dtype, argmax):
    (images, height, width, channels), rois = WORKLOADS[workload]
    itemsize = jnp.dtype(dtype).itemsize
    index = (2 if height * width < 2**15 else 4) if argmax else 0
    levels = table._levels(height, 7) * table._levels(width, 7)
    cells, bins = images * height * width, rois * 7 * 7
    at_least = levels * cells * 16 * (itemsize + index)
    keys, pooled = cells * channels * itemsize, bins * channels * (itemsize + index)
    # The features' keys; twice a block's bins and all of them; float32 sums of a bfloat16 gradient.
    sums = 4 * cells * channels if argmax else 0
    bound = max(1 << 23, at_least) + keys + 3 * pooled + sums
    program = compiled("table", *WORKLOADS[workload], dtype, gradient=argmax)
    assert program.temporary_bytes < bound


MAPS, ROIS = (8, 38, 50, 512), (8, 64, 4)


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
    features, rois, pooled, moves, kind, monkeypatch
):
    monkeypatch.setattr(jax, "device_count", lambda: 4)  # as where there are four
    devices = mesh(kind)
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(devices, spec))
        for shape, spec in ((MAPS, features), (ROIS, rois), ((8, 64, 7, 7, 512), pooled))
    ]

    def both(features, rois, cotangent):
        pooled, pullback = jax.vjp(lambda x: jax_roipool.roi_pool(x, rois, 7), features)
        return pooled, *pullback(cotangent)

    jax.clear_caches()
    program = Compiled(both, *arguments)
    assert program.count("all-reduce") == program.count(*COLLECTIVES) == moves
