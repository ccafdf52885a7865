"""Implementations of the rectangle max, and the choice among them.

A backend is three functions, one for each primitive of `_rectangle_max.py`. They take arrays and
return arrays (`rectangle_max` a list of one or two), and all backends return the same values:

- `rectangle_max(features, *rectangles, argmax_dtype, empty_value)`: the argmax is of that dtype,
  int32 or, if every cell of a map has an index in it, int16; None leaves it out. NaN is larger
  than any number, zeros are equal, and the first of several maxima, or of several NaNs, in
  row-major order is the argmax. A rectangle without cells gives `empty_value` (for -inf in
  integers, the smallest) and argmax -1. An image index outside `[0, n)` gives 0 and argmax -1,
  whatever the rectangle.
- `gather_at_argmax(features, argmax, *rectangles)`: the features there, 0 where argmax is -1.
- `scatter_at_argmax(cotangent, argmax, *rectangles, map_shape)`: the sum over all that go to a
  cell, in float32 at least, in an order that does not change from run to run. An argmax is -1 or
  a cell of its own rectangle.

Any axis but H and W can be of size 0.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jax_roipool._backends import cpu, dense, table, tpu, xla


class Backend(NamedTuple):
    """One implementation of the primitives; the last three are named as the primitives are."""

    name: str
    platforms: frozenset[str] | None  # None: all of them
    what_keeps_it_from_use: Callable[[], str | None]  # on its platforms
    partitions: bool  # whether XLA can split it over devices by itself
    rectangle_max: Callable
    gather_at_argmax: Callable
    scatter_at_argmax: Callable


def _backend(module, platforms, what_keeps_it_from_use, partitions) -> Backend:
    name = module.__name__.rpartition(".")[2]
    operators = (module.rectangle_max, module.gather_at_argmax, module.scatter_at_argmax)
    return Backend(name, platforms, what_keeps_it_from_use, partitions, *operators)


BACKENDS: tuple[Backend, ...] = (
    _backend(cpu, frozenset({"cpu"}), cpu.what_keeps_it_from_use, partitions=False),
    _backend(tpu, frozenset({"tpu"}), tpu.what_keeps_it_from_use, partitions=False),
    _backend(dense, None, lambda: None, partitions=True),
    _backend(table, None, lambda: None, partitions=False),
    _backend(xla, None, lambda: None, partitions=True),
)

BEST_FIRST = {"cpu": ("cpu", "table", "xla"), "tpu": ("tpu", "dense")}
"""What implementation=None takes, by platform."""


def best_first(platform: str) -> tuple[str, ...]:
    """What implementation=None takes on that platform; the last one can always be used."""
    return BEST_FIRST.get(platform, ("xla",))


def check_name(implementation: str | None) -> None:
    """Raises ValueError if no backend has that name."""
    if implementation is not None and implementation not in [b.name for b in BACKENDS]:
        raise ValueError(f"unknown implementation {implementation!r}; there are {_listing()}")


def select(implementation: str | None, platforms: Sequence[str], partitioned: bool) -> Backend:
    """The backend of that name, or the best for these platforms.

    `platforms` is one, or all of a program that are not in `BEST_FIRST`. `partitioned` says that
    XLA will split the program over devices by itself.
    """
    if implementation is not None:
        backend = _named(implementation)
        problem = problem_with(backend, platforms)
        if problem is not None:
            raise ValueError(
                f"implementation {implementation!r} cannot be used on {', '.join(platforms)}: "
                f"{problem}; there are {_listing()}"
            )
        return backend
    *better, last = best_first(platforms[0])
    for backend in map(_named, better):
        if partitioned and not backend.partitions:
            continue
        problem = problem_with(backend, platforms)
        if problem is None:
            return backend
        _say_once(f"implementation {backend.name!r} cannot be used: {problem}")
    return _named(last)


def problem_with(backend: Backend, platforms: Sequence[str]) -> str | None:
    """What keeps a backend from being used on these platforms."""
    if backend.platforms is not None and not backend.platforms.issuperset(platforms):
        return "it is for other platforms"
    return backend.what_keeps_it_from_use()


def splits_by_itself(implementation: str | None) -> bool:
    """Whether it is named, and one that XLA can split over devices by itself."""
    return implementation is not None and _named(implementation).partitions


def _named(name: str) -> Backend:
    return next(backend for backend in BACKENDS if backend.name == name)


@functools.cache
def _say_once(message: str) -> None:
    logging.getLogger("jax_roipool").warning(message)


def _listing() -> str:
    return ", ".join(
        f"{backend.name!r} ({', '.join(sorted(backend.platforms or ['every platform']))})"
        for backend in BACKENDS
    )
