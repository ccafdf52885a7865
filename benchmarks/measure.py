"""How candidates are checked against each other and timed in turn."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from candidates import Run
from workloads import Inputs

REST_SECONDS = 0.01  # by then the threads of other libraries have stopped looking for work
LONG_SECONDS = 1.0  # a call this long need not be warmed up


class Budget(NamedTuple):
    """How long to go on: `seconds` of each candidate's turns, within the numbers of repeats."""

    seconds: float
    min_repeats: int = 3
    max_repeats: int = 200
    slow_seconds: float = float("inf")  # a call that takes longer is not repeated


def measure(
    inputs: Inputs, mode: str, candidates: list, reference: Any, budget: Budget
) -> dict[str, Any]:
    """Times the candidates that have the mode and agree with the reference.

    Returns:
      `times`, by candidate: see `_summary`, and `ratio`, to the reference's median; `errors`, by
      candidate that was not timed.
    """
    runs, errors = {}, {}
    expected = _Expected(reference, inputs, mode)
    for candidate in candidates:
        if mode not in candidate.modes:
            continue
        try:
            run = candidate.prepare(inputs, mode)
            if candidate.convention:
                check(
                    candidate.outputs(run()),
                    expected.outputs(candidate.convention),
                    rounding=reference.rounding,
                )
            runs[candidate.name] = run
        except Exception as error:  # whatever a library raises, the others can still be timed
            errors[candidate.name] = f"{type(error).__name__}: {error}"
            print(f"\nERROR: {candidate.name}, {mode}: {error}\n", file=sys.stderr)
    del expected
    times = _time_in_turn(runs, budget)
    for summary in times.values():
        summary["ratio"] = (
            summary["median_ms"] / times[reference.name]["median_ms"]
            if reference.name in times
            else None
        )
    return {"times": times, "errors": errors}


class _Expected:
    """What the reference pools under each convention, computed when asked for."""

    def __init__(self, reference: Any, inputs: Inputs, mode: str) -> None:
        self.reference, self.inputs, self.mode = reference, inputs, mode
        self.by_convention: dict[str, tuple[np.ndarray, ...]] = {}

    def outputs(self, convention: str) -> tuple[np.ndarray, ...]:
        if convention not in self.by_convention:
            result = self.reference.prepare(self.inputs, self.mode, convention)()
            self.by_convention[convention] = self.reference.outputs(result)
        return self.by_convention[convention]


def check(
    actual: tuple[np.ndarray, ...],
    expected: tuple[np.ndarray, ...],
    tolerance: float = 1e-5,
    rounding: float = 0.0,
) -> None:
    """Raises ValueError unless the gradients, which are sums, are close, and what is pooled equal.

    `tolerance` is a share of the largest gradient, `rounding` of the largest that is pooled.
    """
    names = ("pooled", *["gradient"] * (len(expected) - 1))
    for name, a, b in zip(names, actual, expected, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"{name} has shape {a.shape}, not {b.shape}")
        allowed = (rounding if name == "pooled" else tolerance) * np.abs(b).max()
        differ = ~(np.abs(a - b) <= allowed)
        if differ.any():
            largest = np.abs(a - b).max()
            raise ValueError(
                f"{name} is not what it should be: {differ.sum()} of {differ.size} values differ "
                f"from the reference, by up to {largest:.3g}"
            )


def _time_in_turn(runs: dict[str, Run], budget: Budget) -> dict[str, dict[str, Any]]:
    """Rounds, each with every candidate whose budget lasts, in random order.

    A turn is two calls, of which the second is timed: the first wakes the candidate's threads and
    brings back its data.
    """
    rng = np.random.default_rng(0)
    samples = {name: [] for name in runs}
    spent = dict.fromkeys(runs, 0.0)

    def goes_on(name):
        if any(seconds > budget.slow_seconds for seconds, _ in samples[name]):
            return False
        repeats = len(samples[name])
        in_budget = spent[name] < budget.seconds and repeats < budget.max_repeats
        return in_budget or repeats < budget.min_repeats

    while active := [name for name in runs if goes_on(name)]:
        for name in rng.permutation(active):
            start = time.perf_counter()
            time.sleep(REST_SECONDS)
            if not samples[name] or samples[name][-1][0] < LONG_SECONDS:
                runs[name]()
            samples[name].append(_timed(runs[name]))
            spent[name] += time.perf_counter() - start
    return {name: _summary(*zip(*samples[name], strict=True)) for name in runs}


def _timed(run: Run) -> tuple[float, int]:
    """Seconds and page faults of one call; its result is freed after the clock has stopped."""
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    del result
    return seconds, faults


def _summary(seconds: Sequence[float], faults: Sequence[int]) -> dict[str, Any]:
    p10, median, p90 = (1000 * q for q in np.quantile(seconds, (0.1, 0.5, 0.9)))
    return {
        "median_ms": median,
        "p10_ms": p10,
        "p90_ms": p90,
        "repeats": len(seconds),
        "page_faults": float(np.median(faults)),
    }
