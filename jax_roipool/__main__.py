"""`python -m jax_roipool`: what a bug report should start with, and with `check` a self-test."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys

import jax

import jax_roipool
from jax_roipool import _check
from jax_roipool._backends import native, problem_with
from jax_roipool._backends.rectangle_max import FAMILY
from jax_roipool._backends.rectangle_max.cuda import nvrtc

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jax_roipool")
    parser.add_argument(
        "command",
        nargs="?",
        choices=("check",),
        help="compare every implementation that runs here with NumPy, and time it; without it: "
        "print what there is, and what is missing",
    )
    names = [backend.name for backend in FAMILY.backends]
    parser.add_argument("--implementation", choices=names, help="check this one alone")
    arguments = parser.parse_args()
    if arguments.command == "check":
        return _check.main(arguments.implementation)
    diagnose()
    return 0


def diagnose() -> None:
    """Prints versions, devices, and what serves each platform."""
    print(f"jax_roipool {jax_roipool.__version__}, {jax_roipool.__file__}")
    for package in ("jax", "jaxlib", "flax", "numpy"):
        print(f"{package} {_version(package)}")
    print(f"Python {sys.version.split()[0]}, {platform.platform()}, {platform.machine()}")
    print(f"devices: {', '.join(map(str, jax.devices()))}")

    print(f"native library: {native.library_path() or 'none'}")
    problem = native.load()
    print(f"  not loaded: {problem}" if problem else f"  loaded, vectors: {native.vectors()}")

    print(f"NVRTC, for CUDA kernels: {nvrtc.description()}")

    print("implementation=None, by the platform that a program is compiled for:")
    for platform_name in PLATFORMS:
        chosen, split = (
            FAMILY.choose(None, [platform_name], partitioned=partitioned)[0].name
            for partitioned in (False, True)
        )
        otherwise = f", {split!r} where XLA splits it over devices by itself"
        print(f"  {platform_name}: {chosen!r}{otherwise if split != chosen else ''}")
        for backend in FAMILY.backends:
            problem = problem_with(backend, [platform_name])
            if problem:
                print(f"    not {backend.name!r}: {problem}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"


if __name__ == "__main__":
    sys.exit(main())
