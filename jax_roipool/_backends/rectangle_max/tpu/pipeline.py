"""Inside a TPU kernel: a strip's packs in turn, while the next pack's data are on their way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jax_roipool._backends.rectangle_max.tpu.schedule import PACK

ZERO = np.int32(0)
"""A plain 0 is an int64 where 64-bit types are on, which no TPU counts in."""

SLOTS = 2
"""How many packs a buffer holds: the one at hand, and the next."""


class RoI:
    """A RoI in SMEM, its lanes of `edges`."""

    def __init__(self, ref, start, bins: tuple[int, int]):
        self._ref, self._start, self.bins = ref, start, bins

    @property
    def image(self) -> jax.Array:
        """The image in its group, if there is one of that index."""
        return self._ref[0, self._start]

    def rows(self, p) -> tuple[jax.Array, jax.Array]:
        """The first row of the bins of row `p`, and the row after their last."""
        start = self._start + 1
        return self._ref[0, start + p], self._ref[0, start + self.bins[0] + p]

    def cols(self, q) -> tuple[jax.Array, jax.Array]:
        """The first column of the bins of column `q`, and the column after their last."""
        start = self._start + 1 + 2 * self.bins[0]
        return self._ref[0, start + q], self._ref[0, start + self.bins[1] + q]

    def all_rows(self) -> tuple[jax.Array, jax.Array]:
        """Rows that those of all bins are among."""
        start, end = self.rows(self.bins[0] - 1)
        # The last bin can be empty, and a bin before it reach a row further.
        return self.rows(0)[0], jnp.maximum(start + 1, end)

    def all_cols(self) -> tuple[jax.Array, jax.Array]:
        """Columns that those of all bins are among."""
        start, end = self.cols(self.bins[1] - 1)
        return self.cols(0)[0], jnp.maximum(start + 1, end)


class Record:
    """A pack in SMEM: the first and the last unit whose lists have it, and its RoIs."""

    def __init__(self, ref, bins: tuple[int, int]):
        self._ref, self._bins = ref, bins

    @property
    def first_unit(self) -> jax.Array:
        return self._ref[0, 0]

    @property
    def last_unit(self) -> jax.Array:
        return self._ref[0, 1]

    def roi(self, member) -> RoI:
        """One of the RoIs of the pack."""
        return RoI(self._ref, 2 + member * (1 + 2 * sum(self._bins)), self._bins)


class Strip:
    """What this step of the grid is about."""

    def __init__(self, offsets, images: int, strips: int, rows: int):
        image, strip = pl.program_id(1), pl.program_id(2)
        self.group, self.image = divide(image, images), remainder(image, images)
        self.unit = self.image * strips + strip
        self.top, self.rows = strip * rows, rows
        at = self.group * (images * strips + 1) + self.unit
        self.first, self.end = offsets[at], offsets[at + 1]  # its entries

    def clip(self, rows) -> tuple[jax.Array, jax.Array]:
        """Rows of the map as rows of this strip, as far as they are in it."""
        start, end = rows
        return jnp.maximum(start - self.top, 0), jnp.minimum(end - self.top, self.rows)

    def meets(self, roi: RoI) -> jax.Array:
        """Whether the RoI may have cells in this strip."""
        start, end = self.clip(roi.all_rows())
        return (roi.image == self.image) & (start < end)


def bins_of(ref, group, pack, channels: int):
    """The bins of a pack in an array `[G, P * Q, K, C]`, for this step's channels."""
    rois = pl.ds(pl.multiple_of(pack * PACK, PACK), PACK)
    block = pl.ds(pl.multiple_of(pl.program_id(0) * channels, channels), channels)
    return ref.at[group, :, rois, block]


def divide(number: jax.Array, by: int) -> jax.Array:
    """`number // by` of a number that is not negative; `//` would ask which TPU this is."""
    return lax.div(number, jnp.int32(by))


def remainder(number: jax.Array, by: int) -> jax.Array:
    """`number % by` of a number that is not negative."""
    return lax.rem(number, jnp.int32(by))


def for_each(end: int | jax.Array, body: Callable, start: int | jax.Array = 0) -> None:
    """Calls `body(i)` for i from `start` up to `end`, in a loop of the program."""

    def step(i, _):
        body(i)
        return 0

    lax.fori_loop(jnp.int32(start), jnp.int32(end), step, 0)


def for_each_pack(strip: Strip, loads: Callable[..., Sequence], visit: Callable) -> None:
    """Calls `visit(entry, slot)` for the strip's entries, of which there are some.

    `loads(entry, slot)` are the copies that bring what a visit needs.
    """
    for load in loads(strip.first, jnp.int32(0)):
        load.start()

    def step(entry):
        slot = remainder(entry - strip.first, SLOTS)

        @pl.when(entry + 1 < strip.end)
        def _():
            for load in loads(entry + 1, 1 - slot):
                load.start()

        for load in loads(entry, slot):
            load.wait()
        visit(entry, slot)

    for_each(strip.end, step, strip.first)
