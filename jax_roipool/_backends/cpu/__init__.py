"""The CPU backend: C++ handlers that XLA calls through its FFI. Their sources are in `native/`.

The library is built when the package is installed, if there is a C++ compiler.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import jax
import jax.numpy as jnp

CUSTOM_CALLS = (
    "jax_roipool_cpu_max",
    "jax_roipool_cpu_argmax",
    "jax_roipool_cpu_gather",
    "jax_roipool_cpu_scatter",
)
"""The names of the custom calls in programs for the CPU, for `jax.export` to let them pass."""


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
    problem = what_keeps_it_from_use()
    if problem is not None:
        raise RuntimeError(f"the custom calls of jax_roipool cannot be registered: {problem}")


@functools.cache
def what_keeps_it_from_use() -> str | None:
    """None once the handlers are registered; the first call does that, or finds why it cannot.

    It is not done on import: XLA looks at what is registered when its CPU backend starts, and a
    handler that it refuses then keeps the backend from starting. Later, it is only an error.
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
    """The set of vector instructions that the library has chosen."""
    library = ctypes.CDLL(str(library_path()))
    library.jax_roipool_cpu_vectors.restype = ctypes.c_char_p
    return library.jax_roipool_cpu_vectors().decode()


def rectangle_max(
    features, image_index, row_start, row_end, col_start, col_end, *, argmax_dtype, empty_value
):
    """See `jax_roipool._rectangle_max`: maxima, and argmaxes if asked for, `[G, K, P, Q, C]`."""
    shape = (*row_start.shape, col_start.shape[2], features.shape[4])
    results = [jax.ShapeDtypeStruct(shape, features.dtype)]
    if argmax_dtype:
        results.append(jax.ShapeDtypeStruct(shape, argmax_dtype))
    call = jax.ffi.ffi_call(
        "jax_roipool_cpu_argmax" if argmax_dtype else "jax_roipool_cpu_max", results
    )
    rectangles = (image_index, row_start, row_end, col_start, col_end)
    return call(features, *rectangles, empty_is_lowest=empty_value < 0)


def gather_at_argmax(features, argmax, image_index, *edges):
    """The features at each argmax, 0 where it is -1: `[G, K, P, Q, C]`."""
    result = jax.ShapeDtypeStruct(argmax.shape, features.dtype)
    return jax.ffi.ffi_call("jax_roipool_cpu_gather", result)(features, argmax, image_index)


def scatter_at_argmax(cotangent, argmax, image_index, *edges, map_shape):
    """Each cotangent added at its argmax, none where it is -1: `[G, n, H, W, C]`."""
    shape = (cotangent.shape[0], *map_shape, cotangent.shape[4])
    sum_dtype = cotangent.dtype if cotangent.dtype.itemsize > 4 else jnp.float32
    call = jax.ffi.ffi_call("jax_roipool_cpu_scatter", jax.ShapeDtypeStruct(shape, sum_dtype))
    return call(cotangent, argmax, image_index).astype(cotangent.dtype)
