"""Bin edges: how a RoI's integer extent splits into bins, by a named convention."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

MAX_BINS = 4096
"""Up to this many bins an axis, every product in this module is exact."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convention:
    """How a RoI, given in whole cells, splits into bins.

    Along each axis a RoI from `x1` to `x2` has the length `L = max(x2 - x1 + inclusive_end, 1)`,
    and bin `i` of `P`, with `b = L / P`, covers the cells

    - `[x1 + floor(i*b), x1 + ceil((i + 1)*b))` with `overlapping_bins`,
    - `[x1 + floor(i*b), x1 + max(floor(i*b) + 1, floor((i + 1)*b)))` without,

    as far as they lie inside the map. The bins of a RoI of fewer cells than bins share cells
    either way.

    Args:
      inclusive_end: `x2` is the last cell of the RoI, not the one after it.
      overlapping_bins: bin ends are rounded up, so that neighbours can share a cell; else they
        are rounded down, and neighbours meet.
      float32_edges: `b` and its multiples are rounded to float32, as in torchvision; else they
        are exact.
      empty_value: what a bin without cells pools to, 0 or -inf (for integer features -inf is the
        dtype's smallest value).

    Raises:
      TypeError: a flag is not a bool.
      ValueError: `empty_value` is neither 0 nor -inf.

    The named ones are in `jax_roipool.CONVENTIONS`; one of your own is made from them:

    >>> import dataclasses
    >>> import jax_roipool
    >>> exact = dataclasses.replace(jax_roipool.CONVENTIONS["torchvision"], float32_edges=False)
    >>> exact == jax_roipool.CONVENTIONS["openvino"]
    True
    """

    inclusive_end: bool = False
    overlapping_bins: bool = False
    float32_edges: bool = False
    empty_value: float = 0.0

    def __post_init__(self) -> None:
        for flag in ("inclusive_end", "overlapping_bins", "float32_edges"):
            if not isinstance(getattr(self, flag), bool):
                raise TypeError(f"Convention.{flag} must be a bool, got {getattr(self, flag)!r}")
        if not isinstance(self.empty_value, (int, float)) or self.empty_value not in (
            0.0,
            float("-inf"),
        ):
            raise ValueError(
                f"Convention.empty_value must be 0.0 or -inf, got {self.empty_value!r}"
            )


CONVENTIONS: Mapping[str, Convention] = types.MappingProxyType(
    {
        "partition": Convention(),
        "torchvision": Convention(inclusive_end=True, overlapping_bins=True, float32_edges=True),
        "openvino": Convention(inclusive_end=True, overlapping_bins=True),
        "chainer": Convention(overlapping_bins=True, empty_value=float("-inf")),
    }
)
"""The conventions that have a name, by name: `partition` (the default), `torchvision`,
`openvino` and `chainer`."""


def as_convention(convention: str | Convention) -> Convention:
    """The convention of that name, or the convention itself."""
    if isinstance(convention, Convention):
        return convention
    if not isinstance(convention, str):
        raise TypeError(
            "convention must be a name or a jax_roipool.Convention, "
            f"got {type(convention).__name__}"
        )
    if convention not in CONVENTIONS:
        raise ValueError(
            f"unknown convention {convention!r}; the named ones are "
            f"{', '.join(map(repr, CONVENTIONS))}, and a jax_roipool.Convention states any other"
        )
    return CONVENTIONS[convention]


def bin_edges(
    start: jax.Array, end: jax.Array, bins: int, size: int, convention: Convention
) -> tuple[jax.Array, jax.Array]:
    """First cell of every bin and the one after its last, clipped to `[0, size]`.

    Args:
      start, end: int32 `[...]`, the RoI's coordinates in cells, within +-2**29.
      bins: how many bins, P.
      size: cells of the map along this axis.

    Returns:
      `bin_start`, `bin_end`: int32 `[..., P]`, half-open; an empty bin has `bin_end <= bin_start`.
    """
    length = jnp.maximum(end - start + int(convention.inclusive_end), 1)[..., None]
    if convention.float32_edges:
        floor, ceil = _float32_multiples(length, bins)
    else:
        floor, ceil = _exact_multiples(length, bins)
    bin_start = floor[..., :-1]
    if convention.overlapping_bins:
        bin_end = ceil[..., 1:]
    else:
        bin_end = jnp.maximum(bin_start + 1, floor[..., 1:])
    start = start[..., None]
    return jnp.clip(start + bin_start, 0, size), jnp.clip(start + bin_end, 0, size)


def _bin_index(length: jax.Array, bins: int) -> jax.Array:
    """`0..bins` along the last axis of `length`, which is of size 1."""
    return lax.broadcasted_iota(jnp.int32, (*length.shape[:-1], bins + 1), length.ndim - 1)


def _exact_multiples(length: jax.Array, bins: int) -> tuple[jax.Array, jax.Array]:
    """Floor and ceiling of `i * length / bins` for `i` in `0..bins`, without overflow."""
    i = _bin_index(length, bins)
    quotient, remainder = jnp.divmod(length, bins)
    whole, part = i * quotient, i * remainder
    return whole + part // bins, whole - (-part // bins)


def _float32_multiples(length: jax.Array, bins: int) -> tuple[jax.Array, jax.Array]:
    """Floor and ceiling of `float32(i) * (float32(length) / float32(bins))`."""
    edges = _bin_index(length, bins).astype(jnp.float32) * _float32_quotient(
        length.astype(jnp.float32), bins
    )
    return jnp.floor(edges).astype(jnp.int32), jnp.ceil(edges).astype(jnp.int32)


def _float32_quotient(dividend: jax.Array, divisor: int) -> jax.Array:
    """`dividend / divisor` rounded as IEEE 754 says, whatever the platform's division does.

    XLA multiplies by a rounded reciprocal instead, and GPUs and TPUs divide approximately. So the
    quotient's neighbours are compared by what each leaves of the dividend, which is exact: with
    the upper half of a neighbour's bits and the lower half apart, no product has over 24 bits.
    """
    bits = lax.bitcast_convert_type(dividend / divisor, jnp.int32)
    best, left_by_best = dividend, jnp.full_like(dividend, jnp.inf)
    for step in range(-2, 3):
        quotient = lax.bitcast_convert_type(bits + step, jnp.float32)
        upper = lax.bitcast_convert_type((bits + step) & ~0xFFF, jnp.float32)
        left = jnp.abs((dividend - upper * divisor) - (quotient - upper) * divisor)
        best = jnp.where(left < left_by_best, quotient, best)
        left_by_best = jnp.minimum(left, left_by_best)
    return best
