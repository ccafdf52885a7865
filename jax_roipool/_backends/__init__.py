"""Implementations of the rectangle max, best first, and the choice among them.

A backend is three functions, one for each primitive of `_rectangle_max.py`. They take arrays and
return arrays (`rectangle_max` a list of one or two), and all backends return the same values:

- `rectangle_max(features, *rectangles, with_argmax, empty_value)`: NaN is larger than any number,
  zeros are equal, and the first of several maxima, or of several NaNs, in row-major order is the
  argmax. A rectangle without cells gives `empty_value` (for -inf in integers, the smallest) and
  argmax -1. An image index outside `[0, n)` gives 0 and argmax -1, whatever the rectangle.
- `gather_at_argmax(features, argmax, image_index)`: the features there, 0 where argmax is -1.
- `scatter_at_argmax(cotangent, argmax, image_index, *, map_shape)`: the sum over all that go to a
  cell, in float32 at least, in an order that does not change from run to run.

Any axis but H and W can be of size 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jax_roipool._backends import xla


class Backend(NamedTuple):
    """One implementation of the primitives; the callables are named as the primitives are."""

    name: str
    platforms: frozenset[str] | None  # None: all of them
    rectangle_max: Callable
    gather_at_argmax: Callable
    scatter_at_argmax: Callable

    def runs_on(self, platforms: Sequence[str]) -> bool:
        return self.platforms is None or self.platforms.issuperset(platforms)


BACKENDS: tuple[Backend, ...] = (
    Backend("xla", None, xla.rectangle_max, xla.gather_at_argmax, xla.scatter_at_argmax),
)


def check_name(implementation: str | None) -> None:
    """Raises ValueError if no backend has that name."""
    if implementation is not None and implementation not in [b.name for b in BACKENDS]:
        raise ValueError(f"unknown implementation {implementation!r}; there are {_listing()}")


def select(implementation: str | None, platforms: Sequence[str]) -> Backend:
    """The backend of that name, or the best that runs on all the platforms lowered for."""
    for backend in BACKENDS:
        if implementation in (None, backend.name) and backend.runs_on(platforms):
            return backend
    raise ValueError(
        f"implementation {implementation!r} does not run on {', '.join(platforms)}; "
        f"there are {_listing()}"
    )


def _listing() -> str:
    return ", ".join(
        f"{backend.name!r} ({', '.join(sorted(backend.platforms or ['every platform']))})"
        for backend in BACKENDS
    )
