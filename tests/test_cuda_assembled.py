"""The CUDA kernels as PTX, and assembled: what the driver will be given, and what it makes of it.

By NVRTC, and by two of NVIDIA's assemblers, an old one and a new one. None of them needs a GPU.
"""

import functools
import importlib.util
import re
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from compiled import WORKLOADS
from jax_roipool._backends.rectangle_max.cuda import nvrtc, plans

pytestmark = pytest.mark.full

INT16, INT32 = np.dtype(np.int16), np.dtype(np.int32)
# Folder of NVIDIA's wheels, and the architectures that the assembler in it knows: of a T4, an A100,
# an H100, a B200 and an RTX 5090.
ASSEMBLERS = {
    "CUDA 12.0": ("cuda_nvcc", (75, 80, 90)),
    "CUDA 13": ("cu13", (75, 80, 90, 100, 120)),
}
MAX_REGISTERS = {"rectangle_max.cu": 80, "windows.cu": 128, "scatter_at_argmax.cu": 64}
MAX_REGISTERS_OF_FLOAT64 = MAX_REGISTERS | {"scatter_at_argmax.cu": 128}


@pytest.fixture(scope="module", autouse=True)
def _compiler():
    if problem := nvrtc.problem():
        pytest.skip(problem)


def kernels(workload, dtype):
    (images, *sizes), rois = WORKLOADS[workload]
    problem, dtype = plans.Problem(1, images, *sizes, rois, 7, 7), jnp.dtype(dtype)
    argmax_dtype = INT16 if problem.H * problem.W <= 2**15 else INT32
    for dtype_of_argmax in (None, argmax_dtype):
        plan = plans.rectangle_max(problem, dtype, dtype_of_argmax, empty_is_least=False)
        yield plan.pool
        if plan.make_windows is not None:
            yield plan.make_windows
    for tiling in (plans.FEW_CELLS, plans.MANY_CELLS):
        kernel = plans.scatter_at_argmax(problem, dtype, argmax_dtype, tiling=tiling)
        if kernel is not None:
            yield kernel


@pytest.mark.parametrize("workload", ("vgg-train", "fpn-p2"))
@pytest.mark.parametrize("dtype", plans.ELEMENTS)
def test_text(dtype, workload):
    """What a driver that is older than NVRTC takes, for a T4 and all that came after."""
    for kernel in kernels(workload, dtype):
        text = nvrtc.ptx(kernel)
        assert re.findall(r"(?m)^\.version (.*)$", text) == ["6.3"]
        assert re.findall(r"(?m)^\.target (.*)$", text) == ["sm_75"]
        assert re.findall(r"\.entry (\w+)", text) == [kernel.name]
        assert ".local" not in text


@functools.cache
def assembler(folder):
    roots = importlib.util.find_spec("nvidia").submodule_search_locations
    found = [path for root in roots for path in Path(root).glob(f"{folder}/bin/ptxas")]
    if not found:
        pytest.skip('an assembler is missing: pip install -e ".[cuda-compiler]"')
    return found[0]


@pytest.mark.parametrize(
    ("workload", "dtype"),
    (
        *(("fpn-p2", dtype) for dtype in plans.ELEMENTS),
        *((w, dtype) for w in ("vgg-train", "vgg-infer") for dtype in ("float32", "bfloat16")),
    ),
)
@pytest.mark.parametrize("version", ASSEMBLERS)
def test_registers_are_enough(version, workload, dtype, tmp_path):
    """No register is kept in memory, on any GPU, and several blocks fit a multiprocessor."""
    folder, architectures = ASSEMBLERS[version]
    if dtype not in ("float32", "bfloat16"):
        architectures = architectures[-1:]
    for kernel in kernels(workload, dtype):
        (tmp_path / "kernel.ptx").write_text(nvrtc.ptx(kernel))
        for architecture in architectures:
            command = [assembler(folder), "-v", f"-arch=sm_{architecture}", "kernel.ptx"]
            run = subprocess.run(
                [*command, "-o", "kernel.cubin"], cwd=tmp_path, capture_output=True, text=True
            )
            assert run.returncode == 0, run.stderr
            assert "ignored" not in run.stderr, run.stderr  # a bound that the GPU has no room for
            assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in run.stderr
            (registers,) = re.findall(r"Used (\d+) registers", run.stderr)
            limits = MAX_REGISTERS_OF_FLOAT64 if dtype == "float64" else MAX_REGISTERS
            assert int(registers) <= limits[kernel.source], (kernel, architecture)
