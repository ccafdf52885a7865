"""The CPU backend: handlers of the native library."""

from __future__ import annotations

import jax

from jax_roipool._backends.sums import sum_dtype


def rectangle_max(
    features: jax.Array,
    edges: jax.Array,
    onto: jax.Array | None = None,
    *,
    output_size: tuple[int, int],
    argmax_dtype: jax.typing.DTypeLike | None,
    empty_value: float,
) -> list[jax.Array]:
    """Maxima, and argmaxes if asked for, `[G, K, P, Q, C]`.

    Args:
      features: `[G, n, H, W, C]`.
      edges: `[G, K, 1 + 2P + 2Q]`, see `jax_roipool._backends.rectangle_max`.
      onto: `[G, K, P, Q, C]`, overwritten by the maxima, but for those of RoIs without an image.
      output_size: (P, Q).
      argmax_dtype: int32, int16, or None for no argmaxes.
      empty_value: the maximum of a rectangle without cells, 0 or -inf.
    """
    shape = (*edges.shape[:2], *output_size, features.shape[4])
    results = [jax.ShapeDtypeStruct(shape, features.dtype)]
    with_argmax = argmax_dtype is not None
    if with_argmax:
        results.append(jax.ShapeDtypeStruct(shape, argmax_dtype))
    name = f"jax_roipool_cpu_{'argmax' if with_argmax else 'max'}"
    if onto is None:
        call, operands = jax.ffi.ffi_call(f"{name}_v2", results), (features, edges)
    else:
        call = jax.ffi.ffi_call(f"{name}_onto_v1", results, input_output_aliases={2: 0})
        operands = (features, edges, onto)
    return list(call(*operands, empty_is_lowest=empty_value < 0))


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
    result = jax.ShapeDtypeStruct(shape, sum_dtype(cotangent))
    call = jax.ffi.ffi_call("jax_roipool_cpu_scatter_v2", result)
    return [call(cotangent, argmax, edges).astype(cotangent.dtype)]
