"""Times jax_roipool's operators against other systems on the same data.

    pip install -e ".[benchmark]" && python benchmarks/roi_pooling.py

prints a table and writes `roi_pooling.json`, `workloads.png` and `curves.png` to the `--output`
folder, for RoI max pooling. `--operator roi_align` does so for RoIAlign with two samples along each
axis of a bin, `roi_align-adaptive` with as many as a bin has cells, and `levels` for RoIAlign on
four levels of a pyramid, beside torchvision's `MultiScaleRoIAlign`. `--small --seconds 0.1` tries
it out in a few minutes; `--from FILE` prints and draws a saved run again. Peers that are not
installed are left out, and named.

All candidates run in this one process and use all cores. Answers are compared first: one that is
not the reference's under the same convention, or for averages not within 1e-5 of the largest, is an
error and is not timed. Then each candidate has
one turn a round, in random order, so that noise falls on all of them: two calls, of which the
second is timed. The time is that of a call as a user makes it from Python, with inputs in memory
already, in the layout that the system takes. A result is a new array each time, except for
OpenVINO's, and is freed after the clock has stopped. `forward + gradient` gives the pooled features
and the gradient of their product with a fixed array.

The floors only fill an output of that size: in memory in use already, and in pages that are new to
the process. How many pages were new is in the JSON as `page_faults`; large outputs are, small ones
the allocator hands out again.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import average_candidates
import candidates
import report
from measure import Budget, measure
from workloads import PYRAMIDS, WORKLOADS, Pyramid, Workload, curves


class Operator(NamedTuple):
    """What is timed, and on what."""

    title: str
    makers: Callable[[], dict[str, Callable]]
    workloads: dict[str, Workload] | dict[str, Pyramid]


OPERATORS = {
    "roi_pool": Operator("RoI max pooling", candidates.roi_pool, WORKLOADS),
    "roi_align": Operator(
        "RoIAlign, 2x2 samples a bin,", partial(average_candidates.roi_align, 2), WORKLOADS
    ),
    "roi_align-adaptive": Operator(
        "RoIAlign, adaptive,", partial(average_candidates.roi_align, None), WORKLOADS
    ),
    "levels": Operator("RoIAlign of four levels", partial(average_candidates.levels, 2), PYRAMIDS),
}
CURVES_BASE = "vgg-train"
CURVES_SHARE = 0.2  # of the seconds that a workload gets
CURVES_SLOW_SECONDS = 2.0


def main() -> int:
    """Returns the exit status: 1 if a candidate failed or gave a wrong answer."""
    arguments = _parse_arguments()
    if arguments.saved:
        results = json.loads(arguments.saved.read_text())
        print(report.header(results), *report.rows(results), sep="\n")
    else:
        results = run(arguments)
    _draw(results, arguments.output)
    cells = results["workloads"] + results["curves"]
    errors = [(cell["label"], *error) for cell in cells for error in cell["errors"].items()]
    for error in errors:
        print("ERROR:", *error, file=sys.stderr)
    return 1 if errors else 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--operator", choices=OPERATORS, default="roi_pool", help="what is timed (roi_pool)"
    )
    parser.add_argument(
        "--workload",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(WORKLOADS)}, or for levels of {', '.join(PYRAMIDS)} (default: all)",
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="for each number in the table (default 5)"
    )
    parser.add_argument("--curves", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--small", action="store_true", help="small sizes, to try it out")
    parser.add_argument("--output", type=Path, help="folder (default build/benchmarks/OPERATOR)")
    parser.add_argument("--from", type=Path, dest="saved", metavar="JSON", help="a saved run")
    arguments = parser.parse_args()
    arguments.output = arguments.output or Path("build/benchmarks", arguments.operator)
    names = OPERATORS[arguments.operator].workloads
    arguments.workload = arguments.workload or list(names)
    if unknown := set(arguments.workload) - set(names):
        parser.error(f"no workload of {arguments.operator}: {', '.join(unknown)}")
    return arguments


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures everything, and prints each row as soon as it is there."""
    operator = OPERATORS[arguments.operator]
    found, missing = candidates.available(operator.makers())
    results = {
        "title": operator.title,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "machine": _machine(),
        "candidates": {
            candidate.name: {
                "version": candidate.version,
                "about": candidate.about,
                "convention": candidate.convention,
                "floor": candidate.convention is None,
            }
            for candidate in found
        },
        "missing": missing,
        "reference": found[0].name,
        "workloads": [],
        "curves": [],
    }
    print(report.header(results))
    arguments.output.mkdir(parents=True, exist_ok=True)

    def record(kind: str, cell: dict[str, Any]) -> None:
        results[kind].append(cell)
        print(report.row(cell, list(results["candidates"])), flush=True)
        (arguments.output / "roi_pooling.json").write_text(json.dumps(results, indent=1) + "\n")

    def small(workload):
        return workload.small() if arguments.small else workload

    budget = Budget(arguments.seconds)
    for name in arguments.workload:
        for cell in _workload_cells(found, small(operator.workloads[name]), budget):
            record("workloads", cell)
    budget = Budget(CURVES_SHARE * arguments.seconds, slow_seconds=CURVES_SLOW_SECONDS)
    if arguments.curves and operator.workloads is WORKLOADS:
        for cell in _curve_cells(found, small(WORKLOADS[CURVES_BASE]), budget):
            record("curves", cell)
    return results


def _workload_cells(
    found: list, workload: Workload | Pyramid, budget: Budget
) -> Iterator[dict[str, Any]]:
    inputs = workload.inputs()
    for mode in candidates.MODES:
        measured = measure(inputs, mode, found, found[0], budget)
        yield {
            "label": workload.name,
            "mode": mode,
            "workload": dataclasses.asdict(workload),
            **measured,
        }


def _curve_cells(found: list, base: Workload, budget: Budget) -> Iterator[dict[str, Any]]:
    for quantity, points in curves(base).items():
        going_on = dict.fromkeys(candidates.MODES, found)
        for value, workload in points.items():
            inputs = workload.inputs()
            for mode in candidates.MODES:
                measured = measure(inputs, mode, going_on[mode], found[0], budget)
                yield {
                    "label": f"{quantity} = {value}",
                    "mode": mode,
                    "quantity": quantity,
                    "value": value,
                    "workload": dataclasses.asdict(workload),
                    **measured,
                }
                slow = {
                    name
                    for name, summary in measured["times"].items()
                    if summary["median_ms"] > 1000 * budget.slow_seconds
                }
                going_on[mode] = [c for c in going_on[mode] if c.name not in slow]


def _machine() -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    return {
        "processor": processor,
        "system": platform.platform(),
        "cores": candidates.THREADS,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")},
    }


def _draw(results: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    report.draw_workloads(results).savefig(folder / "workloads.png")
    if results["curves"]:
        report.draw_curves(results).savefig(folder / "curves.png")
    print(f"wrote {folder}/")


if __name__ == "__main__":
    sys.exit(main())
