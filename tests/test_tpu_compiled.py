"""What the compiler for TPUs makes of the maximum on one device: kernels, bytes and loops.

The programs are compiled for v4, v5e, v5p and v6e, and not run: there is no TPU here.
"""

import jax
import jax.numpy as jnp
import pytest

import jax_roipool
from compiled import MOVES, WORKLOADS
from jax_roipool._backends.rectangle_max import dense
from jax_roipool._backends.rectangle_max.tpu import schedule
from tpu_compiler import (
    GENERATIONS,
    Compiled,
    all_arguments,
    forward_arguments,
    nbytes,
    on_one_device,
    pool,
    pullback,
)

pytestmark = pytest.mark.full

DTYPES = (jnp.float32, jnp.bfloat16)
ids = {"ids": lambda value: value if isinstance(value, str) else jnp.dtype(value).name}


def is_compiled_to_kernels(features, rois, output_size=(7, 7), **options):
    compiled = Compiled(
        pullback(output_size), *all_arguments(features, rois, output_size, **options)
    )
    assert compiled.kernels == 2
    assert compiled.count(*MOVES) == 0


@pytest.mark.parametrize(
    ("generation", "dtype"),
    (*((generation, jnp.float32) for generation in GENERATIONS), ("v5e", jnp.bfloat16)),
    **ids,
)
def test_a_map_that_fits_and_one_that_does_not(generation, dtype):
    for name in ("vgg-train", "fpn-p2"):
        is_compiled_to_kernels(*WORKLOADS[name], dtype=dtype, generation=generation)


@pytest.mark.parametrize("channels", (1, 64, 200, 1000))
def test_any_number_of_channels(channels):
    is_compiled_to_kernels((2, 25, 33, channels), (2, 20), dtype=jnp.bfloat16)


@pytest.mark.parametrize("output_size", ((1, 1), (14, 14), (1, 14), (3, 5)))
def test_any_number_of_bins(output_size):
    is_compiled_to_kernels((2, 100, 168, 256), 512, output_size)


@pytest.mark.parametrize("rois", (1, 8192, (16, 512)))
def test_any_number_of_rois(rois):
    is_compiled_to_kernels((16, 50, 84, 256), rois)


def test_the_longest_lists_fit():
    is_compiled_to_kernels((8, 4, 4, 8), schedule.MAX_ENTRIES, (1, 1), generation="v4")
    images = schedule.MAX_STRIPS
    is_compiled_to_kernels((images, 4, 4, 8), (images, 1), (1, 1), generation="v4")


def test_one_cell():
    is_compiled_to_kernels((1, 1, 1, 1), 1, (1, 1))


@pytest.mark.parametrize(
    ("shape", "rois", "output_size", "dtype"),
    (
        ((1, 20, 20, 8), 10, (3, 3), jnp.float16),
        ((1, 20, 9000, 128), 10, (7, 7), jnp.float32),  # a row of it does not fit
        ((1, 40, 40, 256), 10, (64, 64), jnp.float32),  # its bins do not fit
        ((8, 20, 20, 8), 70_000, (2, 2), jnp.float32),  # its lists of RoIs do not fit
    ),
    ids=("float16", "wide", "bins", "lists"),
)
def test_what_the_kernels_cannot_take_is_compiled_without(shape, rois, output_size, dtype):
    compiled = Compiled(pullback(output_size), *all_arguments(shape, rois, output_size, dtype))
    assert compiled.kernels == 0
    assert compiled.count("scatter") == 0


def test_integers_are_compiled_without():
    assert Compiled(pool(), *forward_arguments((1, 20, 20, 8), 10, jnp.int32)).kernels == 0


def test_with_64_bit_types_on(x64):
    compiled = Compiled(pullback(), *all_arguments((2, 38, 50, 256), 64))
    if jax.__version_info__ >= (0, 10):
        assert (compiled.kernels, compiled.count(*MOVES)) == (2, 0)
    else:  # its Pallas cannot
        assert (compiled.kernels, compiled.count("scatter")) == (0, 0)


def test_the_argmax_comes_from_the_kernel_as_well():
    def both(features, rois):
        return jax_roipool.roi_pool_with_argmax(features, rois, 7)

    compiled = Compiled(both, *forward_arguments(*WORKLOADS["fpn"]))
    assert compiled.kernels == 1
    assert compiled.count(*MOVES) == 0


@pytest.mark.parametrize("mapped", ((0, 0), (None, 0), (0, None)))
def test_a_vmap_is_one_kernel_and_no_loop(mapped):
    arguments = [
        on_one_device(shape if axis is None else (4, *shape))
        for shape, axis in zip(((2, 38, 50, 256), (2, 64, 4)), mapped, strict=True)
    ]
    compiled = Compiled(jax.vmap(pool(), mapped), *arguments)
    assert (compiled.kernels, compiled.count(*MOVES)) == (1, 0)

    def gradient(features, rois):
        return jax.grad(lambda x: jnp.sum(pool()(x, rois) ** 2))(features)

    compiled = Compiled(jax.vmap(gradient, mapped), *arguments)
    assert (compiled.kernels, compiled.count(*MOVES)) == (2, 0)


def test_pulling_back_many_cotangents_is_one_kernel():
    features, rois, cotangent = all_arguments((2, 38, 50, 256), (2, 64))
    cotangents = on_one_device((3, *cotangent.shape))
    compiled = Compiled(jax.vmap(pullback(), (None, None, 0)), features, rois, cotangents)
    assert (compiled.kernels, compiled.count(*MOVES)) == (2, 0)


# Bytes, by XLA's own account. Every array is read or written once. Beside that, XLA
# - brings the features of a single image from its layout of choice into rows, and back,
# - fetches the cotangent into a nearer memory ahead of time, which it counts up to four times.


def sizes(workload, dtype):
    """Bytes of the features, the pooled features, their argmax, and the RoIs with all edges."""
    (N, H, W, C), R = WORKLOADS[workload]
    bins = (R, 7, 7, C)
    return (
        nbytes((N, H, W, C), dtype),
        nbytes(bins, dtype),
        nbytes(bins, jnp.int16 if H * W < 2**15 else jnp.int32),
        1200 * R,
    )


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_bytes_of_the_forward_pass(workload, dtype):
    features, rois = WORKLOADS[workload]
    compiled = Compiled(pool(), *forward_arguments(features, rois, dtype))
    maps, pooled, _, records = sizes(workload, dtype)
    relayout = 4 * maps if features[0] == 1 else 0
    assert compiled.kernels == 1
    assert maps + pooled <= compiled.bytes_accessed <= maps + pooled + relayout + 12 * records
    assert compiled.temporary_bytes <= relayout + 4 * records


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_bytes_of_both_passes(workload, dtype):
    features, rois = WORKLOADS[workload]
    compiled = Compiled(pullback(), *all_arguments(features, rois, dtype=dtype))
    maps, pooled, argmax, records = sizes(workload, dtype)
    relayout = 6 * maps if features[0] == 1 else 0
    nearer = 4 * pooled
    least = 2 * maps + 2 * pooled + 2 * argmax
    assert compiled.kernels == 2
    assert least <= compiled.bytes_accessed <= least + relayout + nearer + 15 * records
    # The pooled features, that nobody wants here, their argmax, and the maps in another layout.
    assert compiled.temporary_bytes <= pooled + argmax + relayout + 10 * records


@pytest.mark.parametrize("workload", ("fpn", "fpn-p2"))
def test_bins_are_neither_copied_nor_turned_over(workload):
    compiled = Compiled(pullback(), *all_arguments(*WORKLOADS[workload]))
    pooled = sizes(workload, jnp.float32)[1]
    assert compiled.largest("custom-call") >= pooled
    assert compiled.largest("copy", "copy-start", "transpose", "pad", "fusion") < pooled


@pytest.mark.parametrize("rois", (1000,))
def test_compared_cells_loop_over_many_rois_at_a_time(rois):
    features, rois = (2, 100, 168, 256), (2, rois)
    arguments = all_arguments(features, rois)
    compiled = Compiled(pullback(implementation="dense"), *arguments)
    assert compiled.count("scatter", "gather") == 0
    assert 1 < max(compiled.trips()) <= rois[1] / 8
    # Two arrays of a chunk's size, and what is as large as the arguments.
    assert compiled.temporary_bytes < 2 * dense.CHUNK_BYTES + 3 * sum(
        nbytes(x.shape, x.dtype) for x in arguments
    )
