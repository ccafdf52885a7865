"""Programs for TPUs, compiled by the compiler in libtpu, which needs no TPU."""

import functools
import importlib.util

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

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
