"""What the TPU kernels do in which order: blocks that fit the memories, and lists of RoIs.

A kernel's grid is (images, blocks of channels, strips). A strip is a band of a map's rows, as many
as fit VMEM; most maps are a single one. Each strip stays in VMEM while all RoIs that reach into it
take their turn, by a list that is made here, outside of the kernel, from the rectangles.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LANES, SUBLANES = 128, 8
"""Columns and rows of a vector register of 32-bit values."""

VMEM_BYTES = 12 << 20
"""What a kernel may take of VMEM. The compiler gives a kernel 16 MiB on every TPU from v4 on."""

MAX_ENTRIES = 1 << 16
"""The longest list of RoIs, for the 1 MiB of SMEM of every TPU from v4 on."""

MAX_STRIPS = 1 << 14
"""The most strips, of all images, for the same reason. A strip's number times a RoI's is an int32."""

VECTORS_A_STEP = 4
"""Vectors of a row that an inner loop takes at a time: fewer leave the vector units idle."""


class Blocks(NamedTuple):
    """How a kernel cuts maps `[H, W, C]` into blocks."""

    strips: int
    rows: int  # of a strip
    channels: int  # of a block: all of them, or a multiple of LANES that divides them
    lanes: int  # the channels, filled up to whole vectors
    columns: int  # an inner loop takes at a time

    def padded(self, width: int) -> int:
        """Columns of a buffer in which no step reaches past the end, wherever it starts."""
        return round_up(width, SUBLANES) + self.columns - SUBLANES


def blocks(
    height: int, channels: int, bytes_per_row: int, bytes_besides: int
) -> Blocks | None:
    """The largest blocks that fit VMEM, or None if not even a row does.

    Args:
      height: H.
      channels: C.
      bytes_per_row: what a kernel keeps for a row of a strip, per channel.
      bytes_besides: what it keeps besides, per channel.
    """
    most_lanes = LANES * VECTORS_A_STEP
    if channels % LANES == 0:
        sizes = [c for c in range(most_lanes, 0, -LANES) if channels % c == 0]
    else:
        sizes = [channels]
    for size in sizes:
        lanes = round_up(size, LANES)
        rows = (VMEM_BYTES // lanes - bytes_besides) // bytes_per_row
        if rows >= height:
            break
    if rows < 1:
        return None
    strips = math.ceil(height / rows)
    columns = SUBLANES * max(1, most_lanes // lanes)
    return Blocks(strips, math.ceil(height / strips), size, lanes, columns)


def fits_smem(groups: int, images: int, rois: int, blocks: Blocks) -> bool:
    """Whether the lists of RoIs fit."""
    return (
        rois * blocks.strips <= MAX_ENTRIES and groups * images * blocks.strips <= MAX_STRIPS
    )


class Work(NamedTuple):
    """The lists, all int32. Strips are counted through all images of all groups."""

    records: jax.Array  # [G * K, 1, 1 + 2 * P + 2 * Q], see `Record`
    entries: jax.Array  # [G, 1, K * strips], RoIs strip after strip
    offsets: jax.Array  # [G * (n * strips + 1)], where a strip's RoIs start among the entries
    fetched: jax.Array  # [G * n * strips], the strip to have in VMEM, itself unless it has no RoIs


def work(rectangles: tuple[jax.Array, ...], images: int, blocks: Blocks) -> Work:
    """Every RoI on the list of each strip that it reaches into, and on one at least.

    So each is written, even one that has no cells. The RoIs of a strip keep their order.
    """
    image_index, row_start, row_end, col_start, col_end = rectangles
    groups, rois = image_index.shape
    strips = blocks.strips
    units = images * strips

    valid = (image_index >= 0) & (image_index < images)
    image = jnp.where(valid, image_index, 0)
    row_start, row_end = (jnp.where(valid[..., None], x, 0) for x in (row_start, row_end))
    records = jnp.concatenate(
        [valid[..., None].astype(jnp.int32), row_start, row_end, col_start, col_end], axis=-1
    ).reshape(groups * rois, 1, -1)

    top = jnp.clip(row_start[..., 0] // blocks.rows, 0, strips - 1)
    bottom = jnp.clip((row_end[..., -1] - 1) // blocks.rows, top, strips - 1)
    first, last = image * strips + top, image * strips + bottom  # [G, K]

    unit = jnp.arange(units + 1, dtype=jnp.int32)
    earlier = jnp.clip(unit[:, None] - first[:, None], 0, (last - first + 1)[:, None])
    offsets = earlier.sum(axis=-1, dtype=jnp.int32)  # [G, units + 1]

    # By strip, then by RoI, in one number: XLA compiles a sort of pairs many times as long.
    unit = first[..., None] + jnp.arange(strips, dtype=jnp.int32)
    unit = jnp.where(unit <= last[..., None], unit, units)  # the rest goes to the end
    entries = unit * rois + jnp.arange(rois, dtype=jnp.int32)[:, None]
    entries = entries.reshape(groups, 1, rois * strips)
    if units > 1:
        entries = lax.sort(entries, is_stable=False)
    return Work(
        records,
        entries % rois,
        offsets.ravel(),
        _fetched(jnp.diff(offsets).reshape(groups * images, strips) > 0),
    )


def _fetched(has_work: jax.Array) -> jax.Array:
    """For each strip the one to have in VMEM, so that none is fetched that has no RoIs.

    Without RoIs that is a neighbour in its image, or else what an earlier image had left there.
    """
    images, strips = has_work.shape
    strip = lax.broadcasted_iota(jnp.int32, has_work.shape, 1)
    before = lax.cummax(jnp.where(has_work, strip, -1), axis=1)
    after = jnp.argmax(has_work, axis=1).astype(jnp.int32)[:, None]
    own = strips * jnp.arange(images, dtype=jnp.int32)[:, None]
    own += jnp.where(before >= 0, before, after)
    any_work = has_work.any(axis=1)
    left = lax.cummax(jnp.where(any_work, own[:, -1], 0))
    return jnp.where(any_work[:, None], own, left[:, None]).ravel()


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is no smaller than `size`."""
    return math.ceil(size / multiple) * multiple
