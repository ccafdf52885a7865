"""Inside a TPU kernel: the RoIs of a strip, one after the other, the next one's data on its way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

SLOTS = 2  # of every buffer that a RoI's data pass through


class Record:
    """The rectangles of a RoI, in SMEM."""

    def __init__(self, ref, bin_rows: int, bin_cols: int):
        self._ref, self.bin_rows, self.bin_cols = ref, bin_rows, bin_cols

    @property
    def valid(self) -> jax.Array:
        """Whether the RoI has an image."""
        return self._ref[0, 0] != 0

    def rows(self, p) -> tuple[jax.Array, jax.Array]:
        """The first row of bin row `p`, and the one after its last."""
        return self._ref[0, 1 + p], self._ref[0, 1 + self.bin_rows + p]

    def cols(self, q) -> tuple[jax.Array, jax.Array]:
        """The first column of bin column `q`, and the one after its last."""
        start = 1 + 2 * self.bin_rows
        return self._ref[0, start + q], self._ref[0, start + self.bin_cols + q]


def strip_index(images: int, strips: int) -> tuple[jax.Array, jax.Array]:
    """Of this step of the grid: its group, and its strip among those of the group."""
    image = pl.program_id(0)
    return lax.div(image, images), lax.rem(image, images) * strips + pl.program_id(2)


def at_bins(ref, roi, channels: int):
    """The bins of a RoI in an array `[G * K, P, Q, C]`, for this step's channels."""
    if ref.shape[3] == channels:
        return ref.at[roi]
    start = pl.multiple_of(pl.program_id(1) * channels, channels)
    return ref.at[roi, :, :, pl.ds(start, channels)]


def take_turns(
    first: jax.Array,
    end: jax.Array,
    loads: Callable[[jax.Array, jax.Array], Sequence],
    turn: Callable[[jax.Array, jax.Array], None],
) -> None:
    """Calls `turn(entry, slot)` for the entries from `first` up to `end`, of which there are some.

    `loads(entry, slot)` are the copies that bring what a turn needs.
    """
    for load in loads(first, jnp.int32(0)):
        load.start()

    def step(entry, _):
        slot = lax.rem(entry - first, SLOTS)

        @pl.when(entry + 1 < end)
        def _():
            for load in loads(entry + 1, 1 - slot):
                load.start()

        for load in loads(entry, slot):
            load.wait()
        turn(entry, slot)
        return 0

    lax.fori_loop(first, end, step, 0)


def copy(source, target, semaphore):
    """A copy between memories, to be started and waited for."""
    return pltpu.make_async_copy(source, target, semaphore)
