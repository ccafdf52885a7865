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
    "jax_roipool_cpu_max_v2",
    "jax_roipool_cpu_argmax_v2",
    "jax_roipool_cpu_gather_v2",
    "jax_roipool_cpu_scatter_v2",
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


def rectangle_max(
    features: jax.Array,
    edges: jax.Array,
    *,
    output_size: tuple[int, int],
    argmax_dtype: jax.typing.DTypeLike | None,
    empty_value: float,
) -> list[jax.Array]:
    """Maxima, and argmaxes if asked for, `[G, K, P, Q, C]`.

    Args:
      features: `[G, n, H, W, C]`.
      edges: `[G, K, 1 + 2P + 2Q]`, see `jax_roipool._backends.rectangle_max`.
      output_size: (P, Q).
      argmax_dtype: int32, int16, or None for no argmaxes.
      empty_value: the maximum of a rectangle without cells, 0 or -inf.
    """
    shape = (*edges.shape[:2], *output_size, features.shape[4])
    results = [jax.ShapeDtypeStruct(shape, features.dtype)]
    with_argmax = argmax_dtype is not None
    if with_argmax:
        results.append(jax.ShapeDtypeStruct(shape, argmax_dtype))
    name = "jax_roipool_cpu_argmax_v2" if with_argmax else "jax_roipool_cpu_max_v2"
    return list(jax.ffi.ffi_call(name, results)(features, edges, empty_is_lowest=empty_value < 0))


def gather_at_argmax(features: jax.Array, argmax: jax.Array, edges: jax.Array) -> list[jax.Array]:
    """The features at each argmax, 0 where it is -1: `[G, K, P, Q, C]`.

    Args:
      features: `[G, n, H, W, C]`.
      argmax: `[G, K, P, Q, C]`.
      edges: `[G, K, 1 + 2P + 2Q]`, of which the index of the image is used.
    """
    # The handler takes whole edges: XLA then copies no slice in front of it.
    result = jax.ShapeDtypeStruct(argmax.shape, features.dtype)
    return [jax.ffi.ffi_call("jax_roipool_cpu_gather_v2", result)(features, argmax, edges)]


def scatter_at_argmax(
    cotangent: jax.Array, argmax: jax.Array, edges: jax.Array, *, map_shape: tuple[int, int, int]
) -> list[jax.Array]:
    """Each cotangent added at its argmax, none where it is -1: `[G, n, H, W, C]`.

    Args:
      cotangent: `[G, K, P, Q, C]`.
      argmax: `[G, K, P, Q, C]`.
      edges: `[G, K, 1 + 2P + 2Q]`, of which the index of the image is used.
      map_shape: (n, H, W).
    """
    shape = (cotangent.shape[0], *map_shape, cotangent.shape[4])
    sum_dtype = cotangent.dtype if cotangent.dtype.itemsize > 4 else jnp.float32
    call = jax.ffi.ffi_call("jax_roipool_cpu_scatter_v2", jax.ShapeDtypeStruct(shape, sum_dtype))
    return [call(cotangent, argmax, edges).astype(cotangent.dtype)]
