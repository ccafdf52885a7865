"""Implementations of the primitives, and the choice among them.

A family is the primitives that share their operands, such as those of the rectangle max. A backend
of a family is one function for each of its primitives, of arrays to arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Backend(NamedTuple):
    """One implementation of a family's primitives."""

    name: str
    functions: Mapping[str, Callable]  # by the names of the primitives; each returns a list
    platforms: frozenset[str] | None = None  # None: all of them
    unavailable_reason: Callable[[], str | None] = lambda: None  # on its platforms
    is_partitionable: bool = False  # whether XLA can split it over devices by itself
    takes_symbolic_shapes: bool = False  # those of `jax.export`
    takes_onto: frozenset[str] = frozenset()  # names of functions that have this operand, the last


@dataclasses.dataclass
class Family:
    """The backends of a family, and which of them serve a platform, best first.

    `"*"` stands for the platforms that are not named. The last portable one of a platform can
    always be used: it needs nothing, and XLA can split it over devices.
    """

    backends: tuple[Backend, ...]
    kernels: Mapping[str, tuple[str, ...]]  # written by hand for a platform
    portable: Mapping[str, tuple[str, ...]]  # plain XLA

    @property
    def platforms(self) -> tuple[str, ...]:
        """The platforms that are served by other backends than the rest."""
        return tuple({name: None for name in (*self.kernels, *self.portable) if name != "*"})

    def candidates(self, implementation: str | None, platform: str) -> tuple[str, ...]:
        """The names of the backends that `implementation` allows on a platform, best first."""
        kernels = self.kernels.get(platform, ())
        portable = self.portable.get(platform, self.portable["*"])
        words = {None: kernels + portable, "xla": portable, "kernel": kernels}
        return words[implementation] if implementation in words else (str(implementation),)

    def check_name(self, implementation: str | None) -> None:
        """Raises ValueError for what is neither a word for a choice nor a backend's name."""
        if implementation not in (None, "xla", "kernel", *(b.name for b in self.backends)):
            raise ValueError(
                f"implementation must be None (the best), 'xla' (plain XLA), 'kernel' (written by "
                f"hand, or an error) or a backend's name, {self._listing()}; got {implementation!r}"
            )

    def select(
        self,
        implementation: str | None,
        platforms: Sequence[str],
        *,
        partitioned: bool,
        symbolic: bool = False,
    ) -> Backend:
        """The best backend that `implementation` allows; logs once which kernel cannot serve.

        Args:
          implementation: None, `"xla"`, `"kernel"` or the name of a backend.
          platforms: one of `self.platforms`, or all of a program's that are not among those.
          partitioned: whether XLA will split the program over devices by itself.
          symbolic: whether shapes have symbolic dimensions, for `jax.export`.

        Raises:
          ValueError: there is none; the message says why.
        """
        backend, problems = self.choose(
            implementation, platforms, partitioned=partitioned, symbolic=symbolic
        )
        if implementation is None:
            for name in self.kernels.get(platforms[0], ()):
                if name in problems:
                    _warn_once(f"{problems[name]}; {backend.name!r} is used instead")
        return backend

    def choose(
        self,
        implementation: str | None,
        platforms: Sequence[str],
        *,
        partitioned: bool,
        symbolic: bool = False,
    ) -> tuple[Backend, dict[str, str]]:
        """What `select` selects, and what is wrong with each of the backends that come before."""
        problems = {}
        for backend in map(self.named, self.candidates(implementation, platforms[0])):
            problem = problem_with(backend, platforms)
            splits = not partitioned or backend.is_partitionable or implementation == backend.name
            if problem is None and not splits:
                problem = (
                    "XLA splits this program over devices by itself, which the implementation "
                    "cannot be part of; name the axes in features_spec, or call it inside "
                    "jax.shard_map over all of them"
                )
            if problem is None and symbolic and not backend.takes_symbolic_shapes:
                problem = "it has to know every shape, and here some are symbolic"
            if problem is None:
                return backend, problems
            problems[backend.name] = f"implementation {backend.name!r} cannot be used: {problem}"
        why = "; ".join(problems.values()) or "no kernel was written for it"
        raise ValueError(
            f"implementation {implementation!r} is not to be had on {', '.join(platforms)}: {why}; "
            f"there are {self._listing()}"
        )

    def named(self, name: str) -> Backend:
        """The backend of that name."""
        return next(backend for backend in self.backends if backend.name == name)

    def is_partitionable(self, implementation: str | None) -> bool:
        """Whether XLA can split over devices whatever `implementation` comes to."""
        if implementation in (None, "kernel"):
            return False
        return implementation == "xla" or self.named(implementation).is_partitionable

    def _listing(self) -> str:
        return ", ".join(
            f"{backend.name!r} ({', '.join(sorted(backend.platforms or ['every platform']))})"
            for backend in self.backends
        )


def problem_with(backend: Backend, platforms: Sequence[str]) -> str | None:
    """What keeps a backend from being used on these platforms."""
    if backend.platforms is not None and not backend.platforms.issuperset(platforms):
        return "it is for other platforms"
    return backend.unavailable_reason()


@functools.cache
def _warn_once(message: str) -> None:
    logging.getLogger("jax_roipool").warning(message)
