"""Agreement of arrays on the mesh axes that they vary over inside `jax.shard_map`."""

from __future__ import annotations

from collections.abc import Iterable

import jax
from jax import lax


def vary_with(x: jax.Array, *others: jax.Array) -> jax.Array:
    """`x`, varying over every mesh axis that one of the others varies over.

    Outside of `shard_map` this is `x`. Inside, the gradient of `x` is then summed over the axes
    that were added, as it has to be where only another array is sharded.
    """
    axes = tuple(frozenset().union(*map(_varying, others)) - _varying(x))
    if not axes:
        return x
    if hasattr(lax, "pcast"):
        return lax.pcast(x, axes, to="varying")
    return lax.pvary(x, axes)  # pyright: ignore[reportAttributeAccessIssue]  # before JAX 0.9


def vary_together(*arrays: jax.Array) -> list[jax.Array]:
    """The arrays, each varying over every mesh axis that one of them varies over."""
    return [vary_with(x, *arrays) for x in arrays]


def result_of(
    operands: Iterable[jax.Array], shape: tuple[int, ...], dtype: jax.typing.DTypeLike
) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result, varying over every mesh axis that an operand varies over."""
    axes = frozenset().union(*map(_varying, operands))
    if not axes:
        return jax.ShapeDtypeStruct(shape, dtype)
    some_type = next(jax.typeof(x) for x in operands)
    if hasattr(some_type, "mat"):
        manual = type(some_type.mat)(varying=axes)
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=manual)
    # Before JAX 0.10.
    return jax.ShapeDtypeStruct(shape, dtype, vma=axes)  # pyright: ignore[reportCallIssue]


def _varying(x: jax.Array) -> frozenset:
    array_type = jax.typeof(x)
    if hasattr(array_type, "mat"):
        return array_type.mat.varying
    return array_type.vma  # before JAX 0.10
