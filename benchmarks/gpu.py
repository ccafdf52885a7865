"""Compares all that could be the default on a GPU, with torchvision and with the copy bandwidth.

    pip install -e ".[benchmark]" && python benchmarks/gpu.py

runs on JAX's default device, in less than ten minutes: first `python -m jax_roipool check`, under
`compute-sanitizer` as well if that is installed; then the benchmark. It prints tables and writes
`gpu.json`, and `gpu.md` for docs/gpu.md, to the `--output` folder. Where there is no GPU, `--small
--seconds 0.01` tries it out; its numbers say nothing of a GPU then. torchvision is compared on the
same device if it is installed. The CUDA kernels are tried with other sizes of tiles, blocks and
vectors as well; `--all` adds the portable implementations that are not the default.

Every answer is first compared with the CPU's: pooled features to the bit, gradients to rounding. A
candidate that differs is an error and is not timed. Then each has one turn a round, in random
order: as many calls in a row as take about `--seconds`, queued without waiting, and one wait for
the last. So starting a call is not in its time, unless that takes longer than running it. Beside it
is what the profiler says of a GPU alone: the sum over all kernels and copies of a call. Where there
is no GPU it is the same time again.

"x floor" is how many times as long the device takes as for moving a call's arrays once, at the
bandwidth of a copy in the same run: features and pooled features; with the gradient, those, the
cotangent and the features' gradient. Temporary memory is by XLA's account.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from candidates import FORWARD, MODES, Torchvision
from measure import check
from workloads import WORKLOADS, Inputs, Workload

import jax_roipool
from jax_roipool._backends import problem_with
from jax_roipool._backends.rectangle_max import FAMILY, dense, segment_max
from jax_roipool._backends.rectangle_max.cuda import plans
from jax_roipool._check import platform_of_devices

ROUNDS = 5
PROFILED = 20  # calls
COPY_BYTES, SMALL_COPY_BYTES = 1 << 30, 1 << 24
# Largest error of a gradient, as a share of the largest: rounding of sums, and of what they give.
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}


class Variant(NamedTuple):
    """Another value of a constant that a backend has."""

    label: str
    module: ModuleType
    constant: str
    value: Any


TWO_CHANNELS = plans.MANY_CELLS._replace(vector=2)
VARIANTS = {
    "cuda": (
        Variant("no windows", plans, "LARGEST_WINDOW", 1),
        Variant("128 threads", plans, "THREADS", 128),
        Variant("vectors of 8 bytes", plans, "VECTOR_BYTES", 8),
        Variant("few cells a tile", plans, "MANY_CELLS", plans.FEW_CELLS),
        Variant("many cells a tile", plans, "FEW_CELLS", plans.MANY_CELLS),
        Variant("two channels a lane", plans, "MANY_CELLS", TWO_CHANNELS),
    ),
    "segment_max": (
        Variant("256 MiB at once", segment_max, "CHUNK_BYTES", 1 << 28),
        Variant("4096 MiB at once", segment_max, "CHUNK_BYTES", 1 << 32),
    ),
    "dense": (Variant("1024 MiB at once", dense, "CHUNK_BYTES", 1 << 30),),
}
BY_DEFAULT = ("cpu", "cuda", "tpu", "blocks")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A call to time."""

    run: Callable[[], Any]
    wait: Callable[[Any], Any]
    outputs: Callable[[Any], tuple[np.ndarray, ...]]
    temporary_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Ours:
    """One of this package's implementations, as it is or in one of its `VARIANTS`."""

    implementation: str | None
    variant: Variant | None = None

    @property
    def name(self) -> str:
        return f"{self.implementation}{f', {self.variant.label}' if self.variant else ''}"

    def prepare(self, inputs: Inputs, mode: str, device: jax.Device | None = None) -> Prepared:
        arguments = jax.device_put(inputs, device or jax.devices()[0])
        if mode == FORWARD:
            arguments = arguments[:2]
        pool = functools.partial(self._pool, inputs.cotangent.shape[1:3])
        with self._varied():
            compiled = jax.jit(pool).lower(*arguments).compile()
        return Prepared(
            run=lambda: compiled(*arguments),
            wait=jax.block_until_ready,
            outputs=lambda result: tuple(np.asarray(x, np.float32) for x in result),
            temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
        )

    def _pool(self, output_size, features, rois, cotangent=None):
        def pool(features):
            return jax_roipool.roi_pool(
                features,
                rois,
                output_size,
                convention="torchvision",
                implementation=self.implementation,
            )

        if cotangent is None:
            return (pool(features),)
        pooled, pullback = jax.vjp(pool, features)
        return pooled, *pullback(cotangent)

    @contextlib.contextmanager
    def _varied(self) -> Iterator[None]:
        if self.variant is None:
            yield
            return
        _, module, constant, value = self.variant
        before = getattr(module, constant)
        setattr(module, constant, value)
        jax.clear_caches()  # else it would not be traced again
        try:
            yield
        finally:
            setattr(module, constant, before)
            jax.clear_caches()


class TorchvisionHere(Torchvision):
    """torchvision on a CUDA device if JAX runs on a GPU, else on the CPU."""

    def __init__(self) -> None:
        super().__init__("cuda" if jax.default_backend() == "gpu" else "cpu")

    def prepare(self, inputs: Inputs, mode: str) -> Prepared:
        if inputs.features.dtype != np.float32:
            raise NotImplementedError(f"it has none for {inputs.features.dtype}")
        return Prepared(
            run=super().prepare(inputs, mode),
            wait=lambda _: self.torch.cuda.synchronize() if self.device == "cuda" else None,
            outputs=self.outputs,
        )


def candidates(everything: bool) -> tuple[list, dict[str, str]]:
    """What runs here, torchvision last, and why others do not."""
    found, missing = [], {}
    platform = platform_of_devices()
    for backend in FAMILY.backends:
        problem = problem_with(backend, [platform])
        if problem:
            missing[backend.name] = problem
        elif everything or backend.name in BY_DEFAULT:
            variants = (None, *VARIANTS.get(backend.name, ()))
            found += [Ours(backend.name, variant) for variant in variants]
    try:
        found.append(TorchvisionHere())
    except Exception as error:  # a library that is installed can fail to load in any way
        missing[Torchvision.name] = f"{type(error).__name__}: {error}"
    return found, missing


def copy_bandwidth(num_bytes: int, seconds: float) -> float:
    """Bytes a second, read and written, of a copy with a change of sign."""
    array = jnp.ones(num_bytes // 4)
    negative = jax.jit(jnp.negative)
    call = Prepared(lambda: negative(array), jax.block_until_ready, lambda _: ())
    return 2 * num_bytes / time_in_turn({"copy": call}, seconds)["copy"]


def time_in_turn(calls: dict[str, Prepared], seconds: float) -> dict[str, float]:
    """Median seconds a call, over rounds in which each has one turn."""
    repeats = {name: _repeats(call, seconds) for name, call in calls.items()}
    samples = {name: [] for name in calls}
    rng = np.random.default_rng(0)
    for _ in range(ROUNDS):
        for name in rng.permutation(list(calls)):
            samples[name].append(_seconds(calls[name], repeats[name]))
    return {name: float(np.median(times)) for name, times in samples.items()}


def on_device(call: Prepared) -> float:
    """Seconds a call keeps the GPU busy, by the profiler."""
    call.wait(call.run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(PROFILED):
                result = call.run()
            call.wait(result)
        (file,) = Path(folder).glob("**/*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
    events = (
        event.duration_ns
        for plane in profile.planes
        if "GPU" in plane.name
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    )
    return sum(events) / 1e9 / PROFILED


def _repeats(call: Prepared, seconds: float) -> int:
    repeats = 1
    while (taken := repeats * _seconds(call, repeats)) < seconds / 2:
        repeats *= 2
    return max(1, round(repeats * seconds / taken))


def _seconds(call: Prepared, repeats: int) -> float:
    call.wait(call.run())
    start = time.perf_counter()
    for _ in range(repeats):
        result = call.run()
    call.wait(result)
    return (time.perf_counter() - start) / repeats


def measure(inputs: Inputs, mode: str, everyone: list, seconds: float) -> dict[str, Any]:
    """Times of all whose answers are right, in ms, and what keeps the others from being timed."""
    dtype = str(inputs.features.dtype)
    reference = Ours(None).prepare(inputs, mode, jax.devices("cpu")[0])
    expected = reference.outputs(reference.run())
    calls, not_timed, errors = {}, {}, {}
    for candidate in everyone:
        try:
            call = candidate.prepare(inputs, mode)
            check(call.outputs(call.run()), expected, TOLERANCES[dtype])
            calls[candidate.name] = call
        except NotImplementedError as error:
            not_timed[candidate.name] = str(error)
        except Exception as error:  # whatever it is, the others can still be timed
            errors[candidate.name] = f"{type(error).__name__}: {error}"
    ms = {name: 1000 * s for name, s in time_in_turn(calls, seconds).items()}
    has_gpu = jax.default_backend() == "gpu"
    return {
        "ms": ms,
        "device ms": {n: 1000 * on_device(call) for n, call in calls.items()} if has_gpu else ms,
        "temporary MB": {name: (call.temporary_bytes or 0) / 1e6 for name, call in calls.items()},
        "MB": moved(inputs, mode) / 1e6,
        "not timed": not_timed,
        "errors": errors,
    }


def moved(inputs: Inputs, mode: str) -> int:
    """Bytes of the arrays that a call reads and writes."""
    once = inputs.features.nbytes + inputs.rois.nbytes + inputs.cotangent.nbytes
    return once if mode == FORWARD else 2 * once - inputs.rois.nbytes


def rows(cell: dict[str, Any], bandwidth: float) -> Iterator[str]:
    """A table of one workload, dtype and mode."""
    floor = cell["MB"] / bandwidth  # MB a GB/s are ms
    yield f"\n{cell['workload']}, {cell['dtype']}, {cell['mode']}: floor {floor:.4g} ms"
    torchvision = cell["device ms"].get(Torchvision.name)
    for name, ms in sorted(cell["ms"].items(), key=lambda item: item[1]):
        device = cell["device ms"][name]
        faster = f"{torchvision / device:8.2f}x torchvision" if torchvision else ""
        memory = "" if name == Torchvision.name else f"{cell['temporary MB'][name]:9.1f} MB"
        times = f"{ms:10.4g} ms, device {device:8.4g} ms {device / floor:6.1f}x floor"
        yield f"  {name:26}{times} {memory:>12} {faster}"
    for name, reason in (cell["not timed"] | cell["errors"]).items():
        yield f"  {name:26}{'ERROR: ' if name in cell['errors'] else ''}{reason}"


def summary(cells: list[dict[str, Any]]) -> Iterator[str]:
    """How far from the fastest each is, over the workloads of a dtype and mode."""
    for dtype, mode in dict.fromkeys((cell["dtype"], cell["mode"]) for cell in cells):
        times = [c["device ms"] for c in cells if (c["dtype"], c["mode"]) == (dtype, mode)]
        in_all = [name for name in times[0] if all(name in ms for ms in times)]
        behind = {
            name: float(np.exp(np.mean([np.log(ms[name] / min(ms.values())) for ms in times])))
            for name in in_all
        }
        ranking = sorted(behind.items(), key=lambda item: item[1])
        yield f"{dtype}, {mode}: " + "; ".join(f"{name} {x:.2f}x" for name, x in ranking)


def main() -> int:
    """Returns the exit status: 1 if a candidate failed or gave a wrong answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--dtype", nargs="+", choices=TOLERANCES, default=list(TOLERANCES))
    parser.add_argument("--seconds", type=float, default=0.2, help="of a turn (default 0.2)")
    parser.add_argument("--small", action="store_true", help="small sizes, to try it out")
    parser.add_argument("--all", action="store_true", help="every implementation")
    parser.add_argument("--no-check", action="store_true", help="go on to the benchmark at once")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="folder")
    arguments = parser.parse_args()

    if not arguments.no_check and not is_right_here():
        return 1
    device = jax.devices()[0]
    everyone, missing = candidates(arguments.all)
    copied = SMALL_COPY_BYTES if arguments.small else COPY_BYTES
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"{device.platform}: {device.device_kind}",
        "versions": {name: _version(name) for name in ("jax", "jaxlib", "torch", "torchvision")},
        "missing": missing,
        "copy GB/s": copy_bandwidth(copied, arguments.seconds) / 1e9,
    }
    print(*(f"{name}: {value}" for name, value in results.items()), sep="\n")
    results["cells"] = []
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.workload:
        workload = WORKLOADS[name].small() if arguments.small else WORKLOADS[name]
        for dtype in arguments.dtype:
            inputs = _inputs(workload, dtype)
            for mode in MODES:
                cell = {"workload": name, "dtype": dtype, "mode": mode}
                cell |= measure(inputs, mode, everyone, arguments.seconds)
                results["cells"].append(cell)
                print(*rows(cell, results["copy GB/s"]), sep="\n", flush=True)
                (arguments.output / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    table = arguments.output / "gpu.md"
    table.write_text("\n".join(markdown(results)) + "\n")
    print(
        "\nThe device's time as a multiple of the fastest's, geometric mean:",
        *summary(results["cells"]),
        sep="\n",
    )
    print(f"\n{table} has a table for docs/gpu.md.")
    return 1 if any(cell["errors"] for cell in results["cells"]) else 0


def is_right_here() -> bool:
    """Whether the package's own check passes, and `compute-sanitizer`, if any, says nothing.

    In processes of their own: the sanitizer wants to start its process, and a kernel that goes
    wrong takes its process's device along.
    """
    check = [sys.executable, "-m", "jax_roipool", "check"]
    commands = [check]
    if (sanitizer := shutil.which("compute-sanitizer")) and platform_of_devices() == "cuda":
        # Of its tools the one that gets through a process with JAX: racecheck has crashed in it,
        # whatever the kernels.
        commands += [[sanitizer, "--error-exitcode", "1", *check, "--implementation", "cuda"]]
    for command in commands:
        print("$", *command, flush=True)
        if subprocess.run(command).returncode != 0:
            print("That failed; what follows would say nothing. --no-check goes on all the same.")
            return False
    return True


def markdown(results: dict[str, Any]) -> Iterator[str]:
    """The table of the documentation: the device's milliseconds, of the plain implementations."""
    first = results["cells"][0]["ms"]
    names = [name for name in first if "," not in name]
    yield f"Measured on {results['device']}, {results['versions']}: milliseconds of the device.\n"
    yield f"| workload | dtype | mode | floor | {' | '.join(names)} |"
    yield "|---" * (4 + len(names)) + "|"
    for cell in results["cells"]:
        floor = cell["MB"] / results["copy GB/s"]
        its = cell["device ms"]
        times = [f"{its[name]:.3g}" if name in its else "-" for name in names]
        where = (cell["workload"], cell["dtype"], cell["mode"])
        yield f"| {' | '.join((*where, f'{floor:.3g}', *times))} |"


def _inputs(workload: Workload, dtype: str) -> Inputs:
    inputs = workload.inputs()
    return inputs._replace(
        features=inputs.features.astype(jnp.dtype(dtype)),
        cotangent=inputs.cotangent.astype(jnp.dtype(dtype)),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
