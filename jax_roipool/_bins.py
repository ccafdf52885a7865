"""Bin edges: how RoIs split into bins, by a named convention.

All edges of all RoIs are one array, made by one formula over a table of lanes: XLA compiles that
several times faster than an array for each kind of edge, and fuses it into one loop.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.export import is_symbolic_dim

from jax_roipool._float32 import float32_quotient

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


class _Lanes(NamedTuple):
    """What each lane of the packed edges holds, `[1, 1, 1 + 2P + 2Q]`."""

    is_index: np.ndarray  # the one lane that is no edge
    is_row: np.ndarray  # an edge along H, else along W
    is_end: np.ndarray  # the end of a bin, else its start
    bin: np.ndarray  # i, int32
    bins: np.ndarray  # P or Q, int32
    size: np.ndarray | jax.Array  # H or W, int32; symbolic ones are known when the program runs


def packed_edges(
    image_index: jax.Array,
    cells: jax.Array,
    output_size: tuple[int, int],
    map_size: tuple[int, int],
    convention: Convention,
) -> jax.Array:
    """The image index of every RoI and the edges of its bins, clipped to the map.

    Args:
      image_index: int32 `[G, K]`.
      cells: float32 `[G, K, 4]`, `(x1, y1, x2, y2)` in cells, finite and within +-2**29.
      output_size: (P, Q).
      map_size: (H, W).

    Returns:
      int32 `[G, K, 1 + 2P + 2Q]`: the image index, P row starts, P row ends, Q column starts, Q
      column ends. An empty bin has `end == start`.
    """
    lanes = _lanes(output_size, map_size)
    # C's round, which every peer uses; jnp.round goes to the even neighbour.
    whole = lax.round(cells, lax.RoundingMethod.AWAY_FROM_ZERO).astype(jnp.int32)
    x1, y1, x2, y2 = (whole[..., i : i + 1] for i in range(4))
    start, end = jnp.where(lanes.is_row, y1, x1), jnp.where(lanes.is_row, y2, x2)
    length = jnp.maximum(end - start + int(convention.inclusive_end), 1)
    multiple = _float32_multiple if convention.float32_edges else _exact_multiple
    edge = jnp.clip(start + multiple(length, lanes, convention.overlapping_bins), 0, lanes.size)
    return jnp.where(lanes.is_index, image_index[..., None], edge)


def _lanes(output_size: tuple[int, int], map_size: tuple[int, int]) -> _Lanes:
    (P, Q), (H, W) = output_size, map_size
    counts = np.array([1, P, P, Q, Q])
    where = jnp.where if any(map(is_symbolic_dim, map_size)) else np.where

    def of_each_part(*values):
        return np.repeat(np.array(values), counts)[None, None]

    return _Lanes(
        is_index=of_each_part(True, False, False, False, False),
        is_row=of_each_part(True, True, True, False, False),
        is_end=of_each_part(False, False, True, False, True),
        bin=np.concatenate([np.arange(count, dtype=np.int32) for count in counts])[None, None],
        bins=of_each_part(P, P, P, Q, Q).astype(np.int32),
        size=where(of_each_part(True, True, True, False, False), H, W).astype(np.int32),
    )


def _exact_multiple(length: jax.Array, lanes: _Lanes, overlapping_bins: bool) -> jax.Array:
    """The edge of each lane, in cells from the RoI's start: of multiples of `length / bins`."""
    whole = _divide(length, lanes)
    part = length - whole * lanes.bins  # length = bins * whole + part: no product overflows
    i = jnp.asarray(lanes.bin + lanes.is_end.astype(np.int32))
    if overlapping_bins:
        round_up = np.where(lanes.is_end, lanes.bins - 1, 0).astype(np.int32)
        return i * whole + _divide(i * part + round_up, lanes)
    # Where a bin is shorter than a cell, its end is the cell after its start.
    is_short = lanes.is_end & (whole == 0)
    i = jnp.where(is_short, lanes.bin, i)
    return i * whole + _divide(i * part, lanes) + is_short.astype(jnp.int32)


def _divide(dividend: jax.Array, lanes: _Lanes) -> jax.Array:
    """`dividend // lanes.bins` of what is not negative; a division by a constant is a product."""
    by_rows, by_columns = (
        lax.div(dividend, jnp.full_like(dividend, bins)) for bins in lanes.bins[0, 0, [0, -1]]
    )
    return jnp.where(lanes.is_row, by_rows, by_columns)


def _float32_multiple(length: jax.Array, lanes: _Lanes, overlapping_bins: bool) -> jax.Array:
    """The edge of each lane, in cells from the RoI's start: of `float32(i) * (length / bins)`."""
    step = float32_quotient(length.astype(jnp.float32), lanes.bins.astype(np.float32))

    def multiple(i):
        return i.astype(np.float32) * step

    start, end = multiple(lanes.bin), multiple(lanes.bin + 1)
    if overlapping_bins:
        edge = jnp.where(lanes.is_end, jnp.ceil(end), jnp.floor(start))
        return edge.astype(jnp.int32)
    start, end = (jnp.floor(x).astype(jnp.int32) for x in (start, end))
    return jnp.where(lanes.is_end, jnp.maximum(start + 1, end), start)
