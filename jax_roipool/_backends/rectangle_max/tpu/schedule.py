"""What the TPU kernels do in which order: blocks that fit the memories, and lists of RoIs.

A kernel's grid is (blocks of channels, images, strips). A strip is a band of a map's rows, as many
as fit VMEM; most maps are a single one. Each strip stays in VMEM while all RoIs that reach into it
take their turn, by a list that is made here, outside of the kernel, from their edges.

RoIs come in packs of eight, in their order, and a pack's bins lie side by side in memory: pooled
features are `[G, P * Q, K, C]` in the kernels, so that RoIs fill the sublanes of a vector whatever
the number of bins. XLA, too, prefers them so, and takes the axes' order for a matter of layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_roipool._backends.rectangle_max.portable import has_image, split_edges

LANES, SUBLANES = 128, 8
"""Columns and rows of a vector register of 32-bit values."""

PACK = SUBLANES
"""RoIs to a pack."""

VMEM_BYTES = 12 << 20
"""What a kernel may take of VMEM, of which a v4 has 16 MiB, and later TPUs more.

The compiler's own limit on a v5e is 16 MiB as well.
"""

MAX_ENTRIES = 1 << 16
"""The longest list of packs, for the 1 MiB of SMEM of every TPU from v4 on."""

MAX_STRIPS = 1 << 14
"""The most strips, of all images, for the same reason."""

MAX_SORTED = 1 << 20
"""The most pairs of a pack and a strip, among which the lists are found by sorting."""

VECTORS_A_STEP = 4
"""Vectors of a row that an inner loop takes at a time: fewer leave the vector units idle."""


class Blocks(NamedTuple):
    """How a kernel cuts maps `[H, W, C]` into blocks."""

    strips: int
    rows: int  # of a strip
    channels: int  # of a block, a multiple of LANES
    columns: int  # that an inner loop takes at a time

    def padded(self, width: int) -> int:
        """Columns of a buffer in which no step reaches past the end, wherever it starts."""
        return round_up(width, SUBLANES) + self.columns - SUBLANES


def blocks(maps: tuple[int, ...], num_rois: int, vmem: Callable[[Blocks], int]) -> Blocks | None:
    """The largest blocks that fit VMEM, or None if not even a row does, or the lists do not fit.

    Args:
      maps: `(G, n, H, W, C)`.
      num_rois: K.
      vmem: bytes that a kernel takes with such blocks; every row of a strip takes as many.
    """
    groups, images, height, _, channels = maps
    channels, most = round_up(channels, LANES), LANES * VECTORS_A_STEP
    best = None
    for size in range(most, 0, -LANES):
        if channels % size != 0:
            continue
        columns = SUBLANES * (most // size)
        first_row = vmem(Blocks(height, 1, size, columns))
        next_row = vmem(Blocks(height, 2, size, columns)) - first_row
        rows = 1 + (VMEM_BYTES - first_row) // next_row
        if rows < 1:
            continue
        strips = math.ceil(height / rows)
        best = Blocks(strips, math.ceil(height / strips), size, columns)
        if strips == 1:
            break
    return best if best and _lists_fit(groups, images, num_rois, best) else None


def _lists_fit(groups: int, images: int, num_rois: int, blocks: Blocks) -> bool:
    packs, units = _packs(num_rois), images * blocks.strips
    return (
        packs * _most_visits(images, blocks) <= MAX_ENTRIES
        and groups * units <= MAX_STRIPS
        and units * packs <= MAX_SORTED
    )


def _packs(num_rois: int) -> int:
    """How many packs so many RoIs are."""
    return math.ceil(num_rois / PACK)


def _most_visits(images: int, blocks: Blocks) -> int:
    """How many lists a pack can be on."""
    return min(images, PACK) * blocks.strips


class Work(NamedTuple):
    """The lists, all int32. A unit is a strip of an image, counted through all of a group."""

    records: jax.Array  # [G * packs, 1, ...], see `pipeline.Record`
    entries: jax.Array  # [G, 1, ...], packs, unit after unit
    offsets: jax.Array  # [G * (units + 1)], where a unit's packs start among the entries
    fetched: jax.Array  # [G * units], the unit to have in VMEM, itself unless it has no packs


def work(edges: jax.Array, output_size: tuple[int, int], images: int, blocks: Blocks) -> Work:
    """Every pack on the list of each strip that one of its RoIs reaches into.

    One without any image is on the list of the first strip, so that it is written.
    """
    groups, num_rois, lanes = edges.shape
    packs, strips = _packs(num_rois), blocks.strips
    units = images * strips
    edges = jnp.pad(edges, ((0, 0), (0, packs * PACK - num_rois), (0, 0)), constant_values=-1)

    image, row_start, row_end, _, _ = split_edges(edges, output_size)
    top = row_start[..., 0]
    # The last bin can be empty, and a bin before it reach a row further.
    bottom = jnp.maximum(row_start[..., -1] + 1, row_end[..., -1])
    bottom = jnp.minimum(bottom, strips * blocks.rows)
    reaches = has_image(image, images) & (top < bottom)
    first = jnp.where(reaches, image * strips + lax.div(top, jnp.int32(blocks.rows)), units)
    last = jnp.where(reaches, image * strips + lax.div(bottom - 1, jnp.int32(blocks.rows)), -1)
    first, last = (x.reshape(groups, 1, packs, PACK) for x in (first, last))

    unit = jnp.arange(units, dtype=jnp.int32)[None, :, None, None]
    visits = ((first <= unit) & (unit <= last)).any(axis=-1)  # [G, units, packs]
    unit, first, last = unit[..., 0], first.min(axis=-1), last.max(axis=-1)
    first, last = jnp.where(last < 0, 0, first), jnp.maximum(last, 0)
    visits |= unit == first  # also a pack that reaches nowhere
    counts = visits.sum(axis=-1, dtype=jnp.int32)  # [G, units]

    # By unit, then by pack, in one number: XLA compiles a sort of pairs many times as long.
    entries = unit * packs + jnp.arange(packs, dtype=jnp.int32)[None, None]
    entries = jnp.where(visits, entries, units * packs).reshape(groups, 1, units * packs)
    if units > 1:
        entries = lax.sort(entries, is_stable=False)
    entries = entries[..., : packs * _most_visits(images, blocks)] % packs

    records = [x.reshape(groups * packs, 1) for x in (first, last)]
    records.append(edges.reshape(groups * packs, PACK * lanes))
    records = jnp.concatenate(records, axis=-1)[:, None]
    # In whole vectors, as copies of less are refused by some compilers.
    unused = round_up(records.shape[2], LANES) - records.shape[2]
    return Work(
        jnp.pad(records, ((0, 0), (0, 0), (0, unused))),
        entries,
        jnp.pad(jnp.cumsum(counts, axis=-1, dtype=jnp.int32), ((0, 0), (1, 0))).ravel(),
        _fetched(counts.ravel() > 0),
    )


def _fetched(has_packs: jax.Array) -> jax.Array:
    """For each unit the one to have in VMEM: without packs, the last one before it that has some.

    That one is still there, so that nothing is fetched. Both are `[G * units]`.
    """
    unit = jnp.arange(has_packs.size, dtype=jnp.int32)
    before = lax.cummax(jnp.where(has_packs, unit, -1))
    return jnp.where(before >= 0, before, jnp.argmax(has_packs).astype(jnp.int32))


def pad_channels(array: jax.Array) -> jax.Array:
    """The last axis filled up to whole vectors."""
    channels = array.shape[-1]
    missing = round_up(channels, LANES) - channels
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)])


def to_packs(bins: jax.Array) -> jax.Array:
    """`[G, K, P, Q, C]` as the kernels have it, `[G, P * Q, K, C]`, K a multiple of PACK."""
    groups, num_rois, bin_rows, bin_cols, _ = bins.shape
    missing = _packs(num_rois) * PACK - num_rois
    bins = jnp.pad(bins, ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0)))
    bins = jnp.moveaxis(bins, 1, 3)
    return pad_channels(bins.reshape(groups, bin_rows * bin_cols, *bins.shape[3:]))


def from_packs(bins: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`[G, K, P, Q, C]` again, of that shape."""
    groups, num_rois, bin_rows, bin_cols, channels = shape
    bins = bins[:, :, :num_rois, :channels]
    return jnp.moveaxis(bins.reshape(groups, bin_rows, bin_cols, num_rois, channels), 3, 1)


def packs_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of `to_packs` of an array of that shape."""
    groups, num_rois, bin_rows, bin_cols, channels = shape
    return groups, bin_rows * bin_cols, _packs(num_rois) * PACK, round_up(channels, LANES)


def bytes_of(*arrays: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Their bytes, altogether."""
    return sum(x.size * x.dtype.itemsize for x in arrays)


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is no smaller than `size`."""
    return math.ceil(size / multiple) * multiple
