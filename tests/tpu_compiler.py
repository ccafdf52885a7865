"""Programs for TPUs, compiled by the compiler in libtpu, which needs no TPU."""

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

import jax_roipool
from compiled import Program

GENERATIONS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@functools.cache
def devices(generation="v5e"):
    """Devices to compile for; skips the test where there is no compiler."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is missing: its wheels are for Linux on x86-64")
    return topologies.get_topology_desc(GENERATIONS[generation], platform="tpu").devices


def on_one_device(shape, dtype=np.float32, generation="v5e"):
    """An argument to compile for."""
    sharding = SingleDeviceSharding(devices(generation)[0])
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def mesh(*sizes, kind=AxisType.Auto):
    """A mesh of v5e devices, four in all, of axes "x" and "y"."""
    count = int(np.prod(sizes))
    grid = np.array(devices()[:count]).reshape(sizes)
    return Mesh(grid, tuple("xy"[: len(sizes)]), axis_types=(kind,) * len(sizes))


class Compiled(Program):
    """A program for TPUs."""

    def __init__(self, function, *arguments):
        super().__init__("tpu", function, *arguments)

    @property
    def kernels(self):
        return self.text.count('custom_call_target="tpu_custom_call"')


# What is compiled, and for which arguments.


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


def average(name="roi_align", **options):
    def pool(features, rois):
        return getattr(jax_roipool, name)(features, rois, 7, **options)

    return pool


def nbytes(shape, dtype):
    return math.prod(shape) * jnp.dtype(dtype).itemsize
