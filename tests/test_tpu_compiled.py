"""What the compiler for TPUs makes of the operator: kernels, bytes, loops and collectives.

The programs are compiled for v4, v5e, v5p and v6e, and not run: there is no TPU here.
"""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_roipool
from jax_roipool import _backends
from test_examples import detector  # noqa: F401  # a fixture
from tpu_compiler import COLLECTIVES, GENERATIONS, MOVES, Compiled, mesh, on_one_device

# Of this project's benchmark: features, number of RoIs.
WORKLOADS = {
    "vgg-train": ((1, 38, 50, 512), 128),
    "vgg-infer": ((1, 38, 50, 512), 1000),
    "fpn": ((2, 100, 168, 256), 512),
    "fpn-p2": ((2, 200, 336, 256), 1024),
}
DTYPES = (jnp.float32, jnp.bfloat16)
ids = {"ids": lambda dtype: jnp.dtype(dtype).name}


def pool(output_size=7, implementation=None):
    def pool(features, rois):
        return jax_roipool.roi_pool(features, rois, output_size, implementation=implementation)

    return pool


def pullback(output_size=7, implementation=None):
    """The gradient of the features, for a given cotangent."""

    def gradient(features, rois, cotangent):
        pooled, vjp = jax.vjp(lambda x: pool(output_size, implementation)(x, rois), features)
        del pooled
        return vjp(cotangent)[0]

    return gradient


def forward_arguments(features, rois, dtype=jnp.float32, generation="v5e"):
    """Flat RoIs, as many as `rois` says, or `(N, K)` of them."""
    shape = (rois, 5) if isinstance(rois, int) else (*rois, 4)
    return (
        on_one_device(features, dtype, generation),
        on_one_device(shape, jnp.float32, generation),
    )


def all_arguments(features, rois, output_size=(7, 7), dtype=jnp.float32, generation="v5e"):
    lead = (rois,) if isinstance(rois, int) else rois
    return (
        *forward_arguments(features, rois, dtype, generation),
        on_one_device((*lead, *output_size, features[-1]), dtype, generation),
    )


def is_compiled_to_kernels(features, rois, output_size=(7, 7), **options):
    compiled = Compiled(
        pullback(output_size), *all_arguments(features, rois, output_size, **options)
    )
    assert compiled.kernels == 2
    assert compiled.count(*MOVES) == 0


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_map_that_fits_and_one_that_does_not(generation, dtype):
    for name in ("vgg-train", "fpn-p2"):
        is_compiled_to_kernels(*WORKLOADS[name], dtype=dtype, generation=generation)


@pytest.mark.parametrize("channels", (1, 3, 64, 200, 384, 1000))
def test_any_number_of_channels(channels):
    is_compiled_to_kernels((2, 25, 33, channels), (2, 20), dtype=jnp.bfloat16)


@pytest.mark.parametrize("output_size", ((1, 1), (14, 14), (1, 14), (14, 1), (3, 5), (8, 2)))
def test_any_number_of_bins(output_size):
    is_compiled_to_kernels((2, 100, 168, 256), 512, output_size)


@pytest.mark.parametrize("rois", (1, 9, 8192, (16, 512)))
def test_any_number_of_rois(rois):
    is_compiled_to_kernels((16, 50, 84, 256), rois)


def test_one_cell():
    is_compiled_to_kernels((1, 1, 1, 1), 1, (1, 1))


@pytest.mark.parametrize(
    ("shape", "rois", "output_size", "dtype"),
    (
        ((1, 20, 20, 8), 10, (3, 3), jnp.float16),
        ((1, 20, 20, 8), 10, (3, 3), jnp.int32),
        ((1, 20, 4000, 128), 10, (7, 7), jnp.float32),  # a row of it does not fit
        ((1, 40, 40, 256), 10, (64, 64), jnp.float32),  # its bins do not fit
        ((400, 20, 20, 8), 2000, (2, 2), jnp.float32),  # its lists of RoIs do not fit
    ),
    ids=("float16", "int32", "wide", "bins", "lists"),
)
def test_what_the_kernel_cannot_take_is_compiled_without(shape, rois, output_size, dtype):
    if jnp.issubdtype(dtype, jnp.floating):
        program = pullback(output_size), all_arguments(shape, rois, output_size, dtype)
    else:
        program = pool(output_size), forward_arguments(shape, rois, dtype)
    compiled = Compiled(program[0], *program[1])
    assert compiled.kernels == 0
    assert compiled.count("scatter") == 0


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


# Bytes. The features come, and the gradient goes, once; XLA may bring them into the kernel's row
# by row layout first, and out of it, which is a read and a write each. All else is once.


def nbytes(shape, dtype):
    return math.prod(shape) * jnp.dtype(dtype).itemsize


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_bytes_of_the_forward_pass(workload, dtype):
    features, rois = WORKLOADS[workload]
    compiled = Compiled(pool(), *forward_arguments(features, rois, dtype))
    assert compiled.kernels == 1
    maps, pooled = nbytes(features, dtype), nbytes((rois, 7, 7, features[-1]), dtype)
    records = 1100 * rois  # the rectangles, from RoIs to the kernel, and the lists
    relayout = 2 * maps if features[0] == 1 else 0
    assert maps + pooled <= compiled.bytes_accessed <= maps + relayout + pooled + 5 * records
    assert compiled.temporary_bytes <= relayout + 2 * records


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_bytes_of_both_passes(workload, dtype):
    features, rois = WORKLOADS[workload]
    compiled = Compiled(pullback(), *all_arguments(features, rois, dtype=dtype))
    assert compiled.kernels == 2
    maps, pooled = nbytes(features, dtype), nbytes((rois, 7, 7, features[-1]), dtype)
    cells = features[1] * features[2]
    argmax = nbytes((rois, 7, 7, features[-1]), jnp.int16 if cells < 2**15 else jnp.int32)
    records = 1100 * rois
    relayout = 4 * maps if features[0] == 1 else 0
    least = 2 * maps + 2 * pooled + 2 * argmax
    assert least <= compiled.bytes_accessed <= least + relayout + 10 * records
    # The pooled features, that nobody wants here, their argmax, and the maps in another layout.
    assert compiled.temporary_bytes <= pooled + argmax + relayout + 4 * records
