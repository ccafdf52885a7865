"""`python -m jax_roipool`: what a bug report should start with."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import jax

import jax_roipool
from jax_roipool import _backends
from jax_roipool._backends import cpu

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def main() -> None:
    print(f"jax_roipool {jax_roipool.__version__}, {jax_roipool.__file__}")
    for package in ("jax", "jaxlib", "flax", "numpy"):
        print(f"{package} {_version(package)}")
    print(f"Python {sys.version.split()[0]}, {platform.platform()}, {platform.machine()}")
    print(f"devices: {', '.join(map(str, jax.devices()))}")

    print(f"native library: {cpu.library_path() or 'none'}")
    problem = cpu.what_keeps_it_from_use()
    print(f"  not loaded: {problem}" if problem else f"  loaded, vectors: {cpu.vectors()}")

    print("implementation=None, by the platform that a program is compiled for:")
    for name in PLATFORMS:
        chosen = _backends.select(None, [name], partitioned=False)
        split = _backends.select(None, [name], partitioned=True)
        otherwise = (
            f", {split.name!r} where XLA splits it over devices by itself"
            if split != chosen
            else ""
        )
        print(f"  {name}: {chosen.name!r}{otherwise}")
        for backend in _backends.BACKENDS:
            problem = _backends.problem_with(backend, [name])
            if problem:
                print(f"    not {backend.name!r}: {problem}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"


if __name__ == "__main__":
    main()
