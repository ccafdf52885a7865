"""The CUDA kernels on the CPU, as an implementation of their own.

Their source as C++ (`cuda_emulator/`), under AddressSanitizer and UndefinedBehaviorSanitizer: a
process for each kernel, which ends with a report if it reads or writes out of bounds.
"""

import atexit
import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from jax_roipool._backends.rectangle_max import FAMILY
from jax_roipool._backends.rectangle_max.cuda import nvrtc, xla_call

NAME = "cuda-emulated"
COMPILER = "g++"
EMULATOR = Path(__file__).parent / "cuda_emulator"
FLAGS = (
    *("-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "-Wno-clobbered",  # fibers
)


def install():
    """Adds the implementation, which only its name chooses."""
    functions = {name: _emulated(f) for name, f in FAMILY.named("cuda").functions.items()}
    kernels = FAMILY.named("cuda")._replace(
        name=NAME,
        platforms=frozenset({"cpu"}),
        unavailable_reason=_unavailable_reason,
        functions=functions,
    )
    FAMILY.backends += (kernels,)


def _unavailable_reason():
    return None if shutil.which(COMPILER) else f"there is no {COMPILER}"


def _emulated(function):
    @functools.wraps(function)
    def call(*operands, **params):
        with mock.patch.object(xla_call, "call", _call):
            return function(*operands, **params)

    return call


def _call(kernel, results, *operands):
    """Takes the place of `xla_call.call`."""
    run = functools.partial(launch, kernel, results)
    return list(jax.pure_callback(run, results, *operands))


def launch(kernel, results, *operands):
    """The kernel's results, as NumPy arrays."""
    operands = [np.ascontiguousarray(x) for x in operands]
    results = [np.empty(x.shape, x.dtype) for x in results]
    sizes = [kernel.blocks, kernel.threads, len(operands), len(results)]
    sizes += [x.nbytes for x in (*operands, *results)]
    process = _process(kernel)
    try:
        process.stdin.write(np.array(sizes, np.int64).tobytes())
        for operand in operands:
            process.stdin.write(operand.tobytes())
        process.stdin.flush()
        for result in results:
            data = process.stdout.read(result.nbytes)
            result[...] = np.frombuffer(data, result.dtype).reshape(result.shape)
    except (BrokenPipeError, ValueError) as error:
        _, report = _processes.pop(kernel).communicate()
        raise AssertionError(f"{kernel.name} has ended:\n{report.decode()[:4000]}") from error
    return results


_processes = {}


def _process(kernel):
    if kernel not in _processes:
        _processes[kernel] = subprocess.Popen(
            [_build(kernel)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    return _processes[kernel]


def end_processes():
    """They start again when they are needed."""
    while _processes:
        _processes.popitem()[1].communicate()


@functools.cache
def _folder():
    folder = tempfile.TemporaryDirectory(prefix="jax_roipool_cuda_")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@functools.cache
def _main():
    main = _folder() / "main.o"
    subprocess.run([COMPILER, *FLAGS, "-c", EMULATOR / "main.cc", "-o", main], check=True)
    return main


def _build(kernel):
    source = nvrtc.KERNELS / kernel.source
    meet = int("__syncthreads" in source.read_text())
    macros = (("KERNEL", kernel.name), ("THREADS_MEET", meet), *kernel.macros)
    flags = [f"-D{name}={value}" for name, value in macros]
    flags.append(f'-DSOURCE="{source}"')
    program = _folder() / hashlib.sha256(repr(flags).encode()).hexdigest()
    subprocess.run(
        [COMPILER, *FLAGS, *flags, EMULATOR / "kernel.cc", _main(), "-o", program], check=True
    )
    return program
