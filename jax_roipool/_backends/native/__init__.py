"""The native library: C++ handlers that XLA calls on CPUs through its FFI. Sources are in `src/`.

The library is built when the package is installed, if there is a C++ compiler.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import jax

CUSTOM_CALLS = (
    "jax_roipool_cpu_max_v2",
    "jax_roipool_cpu_max_onto_v1",
    "jax_roipool_cpu_argmax_v2",
    "jax_roipool_cpu_argmax_onto_v1",
    "jax_roipool_cpu_gather_v2",
    "jax_roipool_cpu_scatter_v2",
    "jax_roipool_cpu_weighted_sum_v1",
    "jax_roipool_cpu_weighted_sum_onto_v1",
    "jax_roipool_cpu_weighted_scatter_v1",
)
"""The names of the custom calls in programs for the CPU."""


def register_custom_calls() -> None:
    """Makes the custom calls known to XLA, for a program that was exported with them.

    `roi_pool` does this by itself. A process that only runs what another has exported does not
    call `roi_pool`, and calls this first.

    Raises:
      RuntimeError: the native library is not there, or this jaxlib does not take it.

    Where the program is made:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jax_roipool
    >>> from jax import export
    >>> allowed = [export.DisabledSafetyCheck.custom_call(n) for n in jax_roipool.CUSTOM_CALLS]
    >>> pool = jax.jit(lambda x: jax_roipool.roi_pool(x, jnp.array([[0, 0, 2, 2]]), 1))
    >>> features = jnp.arange(4.0).reshape(2, 2, 1)
    >>> artifact = export.export(pool, disabled_checks=allowed)(features).serialize()

    Where it runs, after `jax_roipool.register_custom_calls()`:

    >>> export.deserialize(artifact).call(features).ravel()
    Array([3.], dtype=float32)
    """
    problem = load()
    if problem is not None:
        raise RuntimeError(f"the custom calls of jax_roipool cannot be registered: {problem}")


@functools.cache
def load() -> str | None:
    """Loads the library and registers its handlers, once. Returns what has prevented that, or None.

    Not on import: XLA looks at what is registered when its CPU backend starts, and a handler that
    XLA refuses then keeps the backend from starting. Later, a refusal is only an error.
    """
    path = library_path()
    if path is None:
        return (
            "its library was not built when jax_roipool was installed; "
            "install it again where there is a C++17 compiler"
        )
    try:
        jax.local_devices(backend="cpu")
        library = ctypes.CDLL(str(path))
        for name in CUSTOM_CALLS:
            handler = jax.ffi.pycapsule(getattr(library, name))
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
    except (OSError, AttributeError, RuntimeError) as error:
        return f"{path} cannot be used; install jax_roipool again ({error})"
    return None


def library_path() -> Path | None:
    """The library, if there is one."""
    # In an editable installation the package has a folder for sources and one for what was built.
    found = (path for folder in __path__ for path in Path(folder).glob("jax_roipool_cpu.*"))
    return next(found, None)


def vectors() -> str:
    """The set of vector instructions that the library has chosen, or why it could choose none.

    Calls then fail with the same reason: the environment variable `JAX_ROIPOOL_CPU_VECTORS` names a
    set that the library or the processor does not have.
    """
    library = ctypes.CDLL(str(library_path()))
    library.jax_roipool_cpu_vectors.restype = ctypes.c_char_p
    return library.jax_roipool_cpu_vectors().decode(errors="replace")
