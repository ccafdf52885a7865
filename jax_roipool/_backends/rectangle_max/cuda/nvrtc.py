"""NVIDIA's run-time compiler, from CUDA C++ to PTX: `libnvrtc`, which JAX for CUDA comes with."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from jax_roipool._backends.rectangle_max.cuda.plans import Kernel

KERNELS = Path(__file__).parent / "kernels"
ARCHITECTURE = "compute_75"  # a T4's; every later GPU takes it
PTX_VERSION = "6.3"  # the first that has compute_75
OLDEST = (12, 0)
MAJORS = (13, 12)


def problem() -> str | None:
    """What keeps kernels from being compiled."""
    library = _library()
    return library if isinstance(library, str) else None


def description() -> str:
    """Where the library was found, and its version."""
    library = _library()
    if isinstance(library, str):
        return library
    major, minor = _version(library)
    return f"{library._name}, CUDA {major}.{minor}"


@functools.cache
def ptx(kernel: Kernel) -> str:
    """The kernel's text, for the driver to assemble for whatever GPU there is.

    Raises:
      RuntimeError: NVRTC does not compile it.
    """
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(library)
    headers = {path.name: path.read_bytes() for path in sorted(KERNELS.glob("*.cuh"))}
    macros = (("KERNEL", kernel.name), *kernel.macros)
    options = [f"--gpu-architecture={ARCHITECTURE}", "--std=c++17"]
    options += [f"--define-macro={name}={value}" for name, value in macros]
    program = ctypes.c_void_p()
    created = library.nvrtcCreateProgram(
        ctypes.byref(program),
        (KERNELS / kernel.source).read_bytes(),
        kernel.source.encode(),
        len(headers),
        _strings(headers.values()),
        _strings(name.encode() for name in headers),
    )
    if created != 0:
        raise RuntimeError(f"NVRTC cannot start: error {created}")
    try:
        arguments = _strings(option.encode() for option in options)
        if library.nvrtcCompileProgram(program, len(options), arguments) != 0:
            log = _text(library, program, "ProgramLog")
            raise RuntimeError(
                f"NVRTC ({description()}) does not compile {kernel.name}, which is a fault of "
                f"jax_roipool; implementation='xla' does without. It says:\n{log}"
            )
        text = _text(library, program, "PTX")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    # NVRTC writes its own version, which a driver that is older refuses.
    return re.sub(r"(?m)^\.version .*", f".version {PTX_VERSION}", text)


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The library, or what is wrong with those there are."""
    problems = []
    for name, builtins in _candidates():
        try:
            # NVRTC 13.0 does not find its builtins by itself.
            for path in builtins:
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            library = ctypes.CDLL(name)
            version = _version(library)
        except (OSError, AttributeError) as error:
            if "/" in name:
                problems.append(f"{name} cannot be used: {error}")
            continue
        if version >= OLDEST:
            return library
        version, oldest = (".".join(map(str, v)) for v in (version, OLDEST))
        problems.append(f"{name} is of CUDA {version}, {oldest} is the oldest that will do")
    found = f" ({'; '.join(problems)})" if problems else ""
    return (
        "NVIDIA's run-time compiler, which makes its kernels, is not there: "
        f'pip install "jax[cuda13]", or nvidia-cuda-nvrtc alone{found}'
    )


def _candidates() -> Iterator[tuple[str, list[Path]]]:
    """Names to load, with libraries to load first: pip's, then the system's."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec and spec.submodule_search_locations) or ():
        for folder in (*(f"cu{major}" for major in MAJORS), "cuda_nvrtc"):
            lib = Path(root) / folder / "lib"
            for path in sorted(lib.glob("libnvrtc.so.*")):
                yield str(path), sorted(lib.glob("libnvrtc-builtins.so.*"))
    for major in MAJORS:
        yield f"libnvrtc.so.{major}", []


def _version(library: ctypes.CDLL) -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def _text(library: ctypes.CDLL, program: ctypes.c_void_p, kind: str) -> str:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{kind}")(program, text)
    return text.value.decode(errors="replace")


def _strings(texts) -> ctypes.Array:
    texts = list(texts)
    return (ctypes.c_char_p * len(texts))(*texts)
