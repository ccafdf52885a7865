"""Weak scaling: the same work for each device, on one device, two, and so on.

    pip install -e ".[benchmark]" && python benchmarks/scaling.py

pools and differentiates a batch that is split over host devices, one for each core: devices of one
process, in a `jit` over a mesh, and devices of as many processes, which do the same at the same
time without knowing of each other. It prints median times of a call, and writes `scaling.json` and
`scaling.png` to the `--output` folder. "fill" only writes an output of that size: how far memory
alone scales.

    python benchmarks/scaling.py --pod v5e:16x16

compiles the same for as many TPUs instead, with libtpu and without a TPU, and prints what the
compiler says that each device moves and holds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

IMAGES, ROIS = 8, 256  # of a device; RoIs of each image
MAP, POD_MAP, BINS = (38, 50, 256), (100, 168, 256), (7, 7)
REPEATS = 100
COLLECTIVES = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="folder")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"default {REPEATS}")
    parser.add_argument("--pod", metavar="TOPOLOGY", help="compile for TPUs, such as v5e:16x16")
    parser.add_argument("--cores", type=int, nargs="+", help=argparse.SUPPRESS)  # a child's
    arguments = parser.parse_args()
    if arguments.pod:
        print(json.dumps(compile_for_pod(arguments.pod), indent=1))
    elif arguments.cores:
        print(json.dumps(measure(arguments.cores, arguments.repeats)))
    else:
        run(arguments)
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Measures on one core, two, and so on, and draws."""
    cores = sorted(os.sched_getaffinity(0))
    rows = []
    for count in range(1, len(cores) + 1):
        (together,) = children([cores[:count]], arguments.repeats)
        apart = children([[core] for core in cores[:count]], arguments.repeats)
        ms = {f"{mode}, one process": ms for mode, ms in together.items()}
        ms |= {f"{mode}, processes": max(child[mode] for child in apart) for mode in together}
        efficiency = {name: rows[0]["ms"][name] / ms[name] for name in ms} if rows else {}
        rows.append({"devices": count, "ms": ms, "efficiency": efficiency})
        for name in ms:
            ratio = f"  efficiency {efficiency[name]:.2f}" if efficiency else ""
            print(f"{count} devices  {name:32}{ms[name]:8.2f} ms{ratio}", flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "scaling.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows).savefig(arguments.output / "scaling.png")
    print(f"wrote {arguments.output}/")


def children(cores_of_each: list[list[int]], repeats: int) -> list[dict[str, float]]:
    """What processes measure at the same time, each with cores of its own."""
    started = []
    for cores in cores_of_each:
        child = [sys.executable, __file__, "--repeats", str(repeats), "--cores", *map(str, cores)]
        started.append(subprocess.Popen(child, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in started]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def measure(cores: list[int], repeats: int) -> dict[str, float]:
    """Milliseconds a call on as many devices as there are cores."""
    os.sched_setaffinity(0, cores)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={len(cores)}"
    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((len(cores),), ("data",), axis_types=(AxisType.Explicit,))
    rng = np.random.default_rng(0)
    images = IMAGES * len(cores)
    height, width, channels = MAP
    start = rng.uniform(0, 0.7, (images, ROIS, 2))
    box = np.concatenate([start, start + rng.uniform(0.05, 0.3, start.shape)], axis=-1)
    arrays = (
        rng.standard_normal((images, *MAP), np.float32),
        (box * (width, height, width, height)).astype(np.float32),
        rng.standard_normal((images, ROIS, *BINS, channels), np.float32),
    )
    arrays = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec("data")))
    ms = {}
    for mode, function in functions().items():
        compiled = jax.jit(function).lower(*arrays).compile()
        assert not re.search(COLLECTIVES, compiled.as_text())
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            jax.block_until_ready(compiled(*arrays))
            times.append(time.perf_counter() - begin)
        ms[mode] = 1000 * float(np.median(times))
    return ms


def functions() -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from jax_roipool import roi_pool

    def fill(features, rois, cotangent):
        del features
        return jnp.broadcast_to(rois[..., :1, None, None], cotangent.shape)

    def forward(features, rois, cotangent):
        del cotangent
        return roi_pool(features, rois, BINS)

    def forward_and_gradient(features, rois, cotangent):
        pooled, pullback = jax.vjp(lambda x: roi_pool(x, rois, BINS), features)
        return pooled, pullback(cotangent)[0]

    return {"fill": fill, "forward": forward, "forward + gradient": forward_and_gradient}


def compile_for_pod(topology: str) -> dict[str, Any]:
    """The compiler's figures for each device, in MB."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-256")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Explicit,))
    images = IMAGES * len(devices)
    shapes = (images, *POD_MAP), (images, ROIS, 4), (images, ROIS, *BINS, POD_MAP[-1])
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    arrays = [jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding) for shape in shapes]
    figures = {"devices": len(devices), "device": devices[0].device_kind}
    for mode, function in functions().items():
        lowered = jax.jit(function).trace(*arrays).lower(lowering_platforms=("tpu",))
        compiled = lowered.compile()
        memory = compiled.memory_analysis()
        figures[mode] = {
            "bytes accessed": compiled.cost_analysis()["bytes accessed"] / 1e6,
            "arguments": memory.argument_size_in_bytes / 1e6,
            "results": memory.output_size_in_bytes / 1e6,
            "temporary": memory.temp_size_in_bytes / 1e6,
            "collectives": len(re.findall(rf" (?:{COLLECTIVES})", compiled.as_text())),
        }
    return figures


def draw(rows: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    devices = [row["devices"] for row in rows]
    for name in rows[0]["ms"]:
        style = "--" if name.endswith("processes") else "-"
        axes.plot(devices, [row["ms"][name] for row in rows], style, marker="o", label=name)
    height, width, channels = MAP
    axes.set(
        xlabel="host devices, each with a core and the same work",
        ylabel="ms a call",
        ylim=(0, None),
        xticks=devices,
        title=f"{IMAGES} maps of {height} x {width} x {channels} and {IMAGES * ROIS} RoIs a device",
    )
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    sys.exit(main())
