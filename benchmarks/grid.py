"""RoI max pooling over a grid of sizes and types, beside others.

    pip install -e ".[benchmark]" && python benchmarks/grid.py

From one call, a map of 160 x 240 cells with 64 channels, 300 RoIs and 7x7 bins, one quantity at a
time is varied: the channels from 1 to 512, the bins from 1x1 to 28x28, the RoIs from 1 to 5000, the
images from 1 to 16, and, against float32, the type of the features. Prints how many times as long
as this package the others take, and writes `grid.json` and `grid.png` to the `--output` folder.
Peers, rounds and checks are those of `roi_pooling.py`.

JAX_ROIPOOL_CPU_VECTORS in the environment chooses the vector instructions, which the JSON has.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import candidates
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from candidates import FORWARD, GRADIENT, MODES, JaxRoIPool
from measure import Budget, measure
from workloads import Inputs, Workload

from jax_roipool._backends import native

BASE = Workload("base", (1, 160, 240, 64), 300)
DTYPES = ("float32", "bfloat16", "float16", "int8", "uint8", "int16", "int32")
WANTED = {"OpenVINO": 1.5, "torchvision": 2.0}
"""Peers, and what none of their ratios should be below."""


class OfType(JaxRoIPool):
    """The best implementation here, with features of a type."""

    convention = None  # which no other candidate has with this type

    def __init__(self, dtype: str) -> None:
        super().__init__(candidates.FAMILY.candidates(None, jax.default_backend())[0])
        self.name = dtype

    def prepare(self, inputs: Inputs, mode: str, convention: str = "torchvision"):
        features = jnp.asarray(30 * inputs.features, self.name)
        return super().prepare(inputs._replace(features=features), mode, convention)


def quantities(base: Workload) -> dict[str, dict[int, Workload]]:
    """Workloads that differ from the base in one quantity, by its name and its values."""
    N, H, W, C = base.map_shape

    def with_map(**sizes):
        shape = {"N": N, "H": H, "W": W, "C": C} | sizes
        return dataclasses.replace(base, map_shape=tuple(shape.values()))

    channels = (1, 2, 3, 5, 8, 13, 21, 32, 64, 128, 256, 512)
    return {
        "channels": {C: with_map(C=C) for C in channels},
        "rows and columns of bins": {
            P: dataclasses.replace(base, output_size=(P, P)) for P in (1, 2, 4, 7, 14, 28)
        },
        "RoIs": {R: dataclasses.replace(base, num_rois=R) for R in (1, 4, 16, 64, 300, 1000, 5000)},
        "images": {N: with_map(N=N) for N in (1, 2, 4, 16)},
    }


def cells(base: Workload, budget: Budget, *, ends: bool) -> Iterator[dict[str, Any]]:
    """One point and pass after the other, or the first and the last of each quantity alone."""
    found, missing = candidates.available(candidates.roi_pool())
    for name, why in missing.items():
        print(f"without {name}: {why}")
    compared = [found[0], *(c for c in found if c.name in WANTED)]
    for quantity, points in quantities(base).items():
        values = (min(points), max(points)) if ends else tuple(points)
        for value, workload in ((value, points[value]) for value in values):
            inputs = workload.inputs()
            for mode in MODES:
                measured = measure(inputs, mode, compared, found[0], budget)
                yield {"quantity": quantity, "value": value, "mode": mode, **measured}
    types = [OfType(dtype) for dtype in DTYPES]
    measured = measure(base.inputs(), FORWARD, types, types[0], budget)
    yield {"quantity": "type", "value": "", "mode": FORWARD, **measured}


def draw(results: list[dict[str, Any]]):
    """Ratios against each quantity, and the times of types as shares of float32's."""
    names = list(dict.fromkeys(cell["quantity"] for cell in results))
    figure, all_axes = plt.subplots(
        1, len(names), figsize=(4 * len(names), 4), layout="constrained"
    )
    for axes, quantity in zip(all_axes, names, strict=True):
        of_quantity = [cell for cell in results if cell["quantity"] == quantity]
        axes.set_title(quantity)
        axes.grid(alpha=0.3)
        if quantity == "type":
            times = of_quantity[0]["times"]
            axes.bar(list(times), [time["ratio"] for time in times.values()])
            axes.tick_params(axis="x", rotation=60)
            axes.set_ylabel("time, float32 = 1")
            continue
        for peer in WANTED:
            for mode, style in ((FORWARD, "-"), (GRADIENT, "--")):
                points = [
                    (cell["value"], cell["times"][peer]["ratio"])
                    for cell in of_quantity
                    if cell["mode"] == mode and peer in cell["times"]
                ]
                if points:
                    axes.plot(
                        *zip(*points, strict=True), style, marker="o", label=f"{peer}, {mode}"
                    )
        for wanted in WANTED.values():
            axes.axhline(wanted, color="gray", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylabel("time, jax_roipool = 1")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure


def main() -> int:
    """Returns the exit status: 1 if a candidate failed or gave a wrong answer."""
    parser = argparse.ArgumentParser(description="RoI max pooling over a grid of sizes and types.")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each time (default 1)")
    parser.add_argument("--small", action="store_true", help="few and small sizes, to try it out")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/grid"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    vectors = native.vectors() if native.load() is None else "none: no native library"
    results: dict[str, Any] = {"vectors": vectors, "cores": candidates.THREADS, "cells": []}
    print(f"vectors: {vectors}, cores: {candidates.THREADS}")
    base = BASE
    if arguments.small:
        base = dataclasses.replace(BASE, map_shape=(1, 20, 30, 4), num_rois=8)
    for cell in cells(base, Budget(arguments.seconds), ends=arguments.small):
        results["cells"].append(cell)
        ratios = "  ".join(
            f"{name} {time['median_ms']:.3g} ms ({time['ratio']:.2f}x)"
            + (
                " BELOW"
                if cell["quantity"] != "type" and time["ratio"] < WANTED.get(name, 0)
                else ""
            )
            for name, time in cell["times"].items()
        )
        print(f"{cell['quantity']} {cell['value']}, {cell['mode']}: {ratios}", flush=True)
        (arguments.output / "grid.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results["cells"]).savefig(arguments.output / "grid.png")
    print(f"wrote {arguments.output}/")
    return 1 if any(cell["errors"] for cell in results["cells"]) else 0


if __name__ == "__main__":
    sys.exit(main())
