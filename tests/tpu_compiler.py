"""Programs compiled for TPUs by the compiler in libtpu, which needs no TPU, looked into."""

import functools
import importlib.util
import math
import re

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

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


def mesh(*sizes, names="xy"):
    """A mesh of v5e devices, four in all."""
    count = int(np.prod(sizes))
    grid = np.array(devices()[:count]).reshape(sizes)
    names = tuple(names[: len(sizes)])
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(sizes))


class Compiled:
    """A program for TPUs."""

    def __init__(self, function, *arguments):
        traced = jax.jit(function).trace(*arguments)
        self.program = traced.lower(lowering_platforms=("tpu",)).compile()
        self.text = self.program.as_text()

    @property
    def kernels(self):
        return self.text.count('custom_call_target="tpu_custom_call"')

    @property
    def bytes_accessed(self):
        costs = self.program.cost_analysis()
        return (costs[0] if isinstance(costs, list) else costs)["bytes accessed"]

    @property
    def temporary_bytes(self):
        return self.program.memory_analysis().temp_size_in_bytes

    def count(self, *operations):
        """How many of these HLO operations there are, started ones included."""
        names = "|".join(operations)
        return len(re.findall(rf" (?:{names})(?:-start)?\(", self.text))

    def find(self, pattern):
        """All that a regular expression matches."""
        return re.findall(pattern, self.text)

    def trips(self):
        """How often each loop goes round, by the constant that its condition counts up to."""
        conditions = self.find(r" while\(.*condition=(%[\w.-]+)")
        bodies = [self.text[self.text.index(f"\n{name} (") :] for name in conditions]
        return [int(re.search(r" constant\((\d+)\)", body)[1]) for body in bodies]

    def largest(self, *operations):
        """Bytes of the largest array that comes out of one of these HLO operations."""
        results = " ".join(self.find(rf"= ([^=]*?) (?:{'|'.join(operations)})\("))
        arrays = re.findall(r"[a-z](\d+)\[([\d,]+)\]", results)
        sizes = [int(bits) // 8 * math.prod(map(int, shape.split(","))) for bits, shape in arrays]
        return max(sizes, default=0)


MOVES = ("gather", "scatter", "while")
COLLECTIVES = (
    "all-gather",
    "all-to-all",
    "all-reduce",
    "collective-permute",
    "reduce-scatter",
    "ragged-all-to-all",
    "collective-broadcast",
)
