"""The operand that says which cells taps are: what is in it, and where."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Cells(NamedTuple):
    """See `jax_roipool._backends.weighted_sum`."""

    image_index: jax.Array  # int32 [...]
    counts: jax.Array  # int32 [..., 2]
    rows: jax.Array  # int32 [..., P, S]
    columns: jax.Array  # int32 [..., Q, U]


def unpack(
    cells: jax.Array, rows: tuple[int, ...], columns: tuple[int, ...], run: tuple[int, int]
) -> Cells:
    """Of `[..., 3 + P*S + Q*U]`; `rows` and `columns` are the shapes of their weights."""
    (*_, P, T), (*_, Q, V) = rows, columns
    S, U = T // run[0], V // run[1]
    lead, split = cells.shape[:-1], 3 + P * S
    return Cells(
        cells[..., 0],
        cells[..., 1:3],
        cells[..., 3:split].reshape(*lead, P, S),
        cells[..., split:].reshape(*lead, Q, U),
    )
