"""Programs for an H100, compiled by the compiler in JAX's CUDA plugin, which needs no GPU."""

import functools
import importlib.util
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

from compiled import Program

# As XLA describes the card, in part; from https://github.com/openxla/xla/pull/25919.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@functools.cache
def devices():
    """Four devices to compile for; skips the test where there is no compiler."""
    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        pytest.skip('the CUDA plugin of JAX is missing: pip install -e ".[cuda-compiler]"')
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x4")
    return topology.devices


def on_the_gpu(shape, dtype=np.float32):
    """An argument to compile for one."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(devices()[0]))


def mesh(kind):
    """A mesh of all four, of an axis "x"."""
    return Mesh(np.array(devices()), ("x",), axis_types=(kind,))


class Compiled(Program):
    """A program for CUDA."""

    def __init__(self, function, *arguments):
        super().__init__("cuda", function, *arguments)
        if self.text is None:  # before JAX 0.9 the plugin has none
            self.text = _dumped(function, *arguments)


def _dumped(function, *arguments):
    """The program's text as XLA itself writes it to a file."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
        lowered.compile(compiler_options=options)
        (path,) = Path(folder).glob("*after_optimizations.txt")
        return path.read_text()
