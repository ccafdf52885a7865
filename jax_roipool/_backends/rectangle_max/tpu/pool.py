"""The TPU kernel for `rectangle_max`.

A strip of the map is in VMEM as keys (`ordered.py`). For each RoI of a pack, and for eight rows of
bins at a time, the maxima go

1. over the rows of a bin, for all columns of the RoI, eight columns to a vector; each vector is
   stored so that rows of bins come to lie where the columns lay;
2. over the columns of a bin, for eight rows of bins at once; each vector is stored so that the RoIs
   of the pack come to lie where the rows of bins lay.

Beside a maximum goes its cell, the smallest of equals, as it is the first in row-major order. A
pack that is on the list of several strips is pooled in each, and what it had is fetched and merged.

What one call moves: every strip once (none without RoIs), every output once, and twice more for
each further strip that a pack is on the list of.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_roipool._backends.rectangle_max.ordered import from_ordered, lowest, to_bits, to_ordered
from jax_roipool._backends.rectangle_max.portable import first_maximum, has_image
from jax_roipool._backends.rectangle_max.tpu import schedule
from jax_roipool._backends.rectangle_max.tpu.pipeline import (
    SLOTS,
    ZERO,
    Record,
    RoI,
    Strip,
    bins_of,
    divide,
    for_each,
    for_each_pack,
    remainder,
)
from jax_roipool._backends.rectangle_max.tpu.schedule import LANES, PACK, SUBLANES, Blocks, round_up
from jax_roipool._manual_axes import result_of

NOTHING = np.iinfo(np.int32).min
"""Below every key: no cell found yet. `from_ordered` makes -0 of it, and of nothing else."""

NO_CELL = np.iinfo(np.int32).max
"""Behind every cell."""


class Buffers(NamedTuple):
    """What the kernel has in VMEM for one of its results, the maxima or their cells."""

    over_rows: Any  # int32 [C / 128, 8 * columns, 128], of one RoI
    over_both: Any  # int32 [C / 128, 8 * bins, 128], of a pack
    to_send: Any  # [bins, 8, C], of the result's dtype
    sent: Any  # a semaphore
    merged: Any  # [bins, 8, C], what earlier strips gave
    fetched: Any  # a semaphore


class Scratch(NamedTuple):
    """What the kernel has beside its operands and results."""

    records: Any  # in SMEM
    records_arrived: Any  # semaphores
    keys: Any  # int32 [rows, columns, C], the strip in VMEM
    buffers: list[Buffers]  # of each result


def blocks(features, num_rois: int, output_size: tuple[int, int]) -> Blocks | None:
    """How to cut the maps, or None if it cannot be done."""
    width, (bin_rows, bin_cols) = features.shape[3], output_size
    fetched_width = round_up(width, 2 * SUBLANES) * features.dtype.itemsize
    bins = bin_cols * PACK * 4
    over_both, staged = round_up(bin_rows, SUBLANES) * bins, bin_rows * bins

    def vmem(blocks: Blocks) -> int:
        padded_width = blocks.padded(width) * 4
        strip = blocks.rows * (fetched_width + padded_width)
        return blocks.channels * (strip + 2 * (padded_width * SUBLANES + over_both + 2 * staged))

    return schedule.blocks(features.shape, num_rois, vmem)


def rectangle_max(features, edges, blocks, *, output_size, argmax_dtype, empty_value, interpret):
    """See `jax_roipool._backends.rectangle_max`."""
    groups, images, height, width, channels = features.shape
    num_rois, (bin_rows, bin_cols) = edges.shape[1], output_size
    strips, block = blocks.strips, blocks.channels
    work = schedule.work(edges, output_size, images, blocks)
    features = schedule.pad_channels(features.reshape(groups * images, *features.shape[2:]))

    shape = (groups, num_rois, bin_rows, bin_cols, channels)
    dtypes = [features.dtype, argmax_dtype] if argmax_dtype else [features.dtype]
    results = [result_of((features, edges), schedule.packs_shape(shape), dtype) for dtype in dtypes]
    over_rows = (block // LANES, blocks.padded(width) * SUBLANES, LANES)
    over_both = (block // LANES, round_up(bin_rows, SUBLANES) * bin_cols * PACK, LANES)
    bins = (bin_rows * bin_cols, PACK, block)
    scratch = Scratch(
        records=pltpu.SMEM((SLOTS, *work.records.shape[1:]), jnp.int32),
        records_arrived=pltpu.SemaphoreType.DMA((SLOTS,)),
        keys=pltpu.VMEM((blocks.rows, blocks.padded(width), block), jnp.int32),
        buffers=[
            Buffers(
                over_rows=pltpu.VMEM(over_rows, jnp.int32),
                over_both=pltpu.VMEM(over_both, jnp.int32),
                to_send=pltpu.VMEM(bins, dtype),
                sent=pltpu.SemaphoreType.DMA(()),
                merged=pltpu.VMEM(bins, dtype),
                fetched=pltpu.SemaphoreType.DMA(()),
            )
            for dtype in dtypes
        ],
    )

    def unit_to_fetch(channel_block, image, strip, fetched, *_):
        unit = fetched[image * strips + strip]
        return divide(unit, strips), remainder(unit, strips), ZERO, channel_block

    any_memory = pl.BlockSpec(memory_space=pl.ANY)
    call = pl.pallas_call(
        functools.partial(
            _kernel,
            images=images,
            strips=strips,
            height=height,
            bins=output_size,
            columns=blocks.columns,
            empty=lowest(features.dtype) if empty_value < 0 else 0,
        ),
        name="roi_pool",
        out_shape=[results],  # one argument of the kernel, as the scratch is
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(features.shape[3] // block, groups * images, strips),
            in_specs=[
                pl.BlockSpec(
                    (1, 1, work.entries.shape[2]),
                    lambda _, image, *__: (divide(image, images), ZERO, ZERO),
                    memory_space=pltpu.SMEM,
                ),
                any_memory,
                pl.BlockSpec(
                    (1, blocks.rows, width, block), unit_to_fetch, pipeline_mode=pl.Buffered(1)
                ),
            ],
            out_specs=[[any_memory] * len(results)],
            scratch_shapes=[scratch],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(
                "parallel",
                "parallel" if images == 1 else "arbitrary",  # a pack can have RoIs of several
                "arbitrary",
            )
        ),
        cost_estimate=pl.CostEstimate(
            flops=groups * num_rois * height * width * channels,
            bytes_accessed=schedule.bytes_of(features, work.records, *results),
            transcendentals=0,
        ),
        interpret=interpret,
    )
    (pooled,) = call(work.fetched, work.offsets, work.entries, work.records, features)
    return [schedule.from_packs(x, shape) for x in pooled]


def _kernel(
    fetched,
    offsets,
    entries,
    records,
    features,
    results,
    scratch: Scratch,
    *,
    images: int,
    strips: int,
    height: int,
    bins: tuple[int, int],
    columns: int,
    empty: int,
):
    """One strip of an image, `features` `[1, rows, W, C]`, and the packs on its list."""
    del fetched
    buffers = scratch.buffers
    _, rows, width, channels = features.shape
    strip = Strip(offsets, images, strips, rows)

    def load_record(entry, slot):
        record = strip.group * (results[0].shape[2] // PACK) + entries[0, 0, entry]
        arrived = scratch.records_arrived.at[slot]
        return [pltpu.make_async_copy(records.at[record], scratch.records.at[slot], arrived)]

    def sends(entry):
        for result, buffer in zip(results, buffers, strict=True):
            pooled = bins_of(result, strip.group, entries[0, 0, entry], channels)
            yield pltpu.make_async_copy(buffer.to_send, pooled, buffer.sent)

    def fetches(entry):
        for result, buffer in zip(results, buffers, strict=True):
            pooled = bins_of(result, strip.group, entries[0, 0, entry], channels)
            yield pltpu.make_async_copy(pooled, buffer.merged, buffer.fetched)

    def pool_pack(entry, slot):
        record = Record(scratch.records.at[slot], bins)
        is_revisited = strip.unit != record.first_unit
        if images * strips > 1:

            @pl.when(is_revisited)
            def _():
                for fetch in fetches(entry):
                    fetch.start()

        over_both = buffers[0].over_both

        def clear(i):
            at = pl.ds(pl.multiple_of(i * PACK, PACK), PACK)
            for block in range(channels // LANES):
                over_both[block, at, :] = jnp.full((PACK, LANES), NOTHING, jnp.int32)

        for_each(over_both.shape[1] // PACK, clear)

        def pool_roi(member):
            roi = record.roi(member)

            @pl.when(strip.meets(roi))
            def _():
                def pool_tile(tile):
                    _max_over_rows(tile, roi, strip, scratch.keys, buffers, width, columns)
                    _max_over_columns(tile, roi, member, buffers)

                for_each(pl.cdiv(bins[0], SUBLANES), pool_tile)

        for_each(PACK, pool_roi)

        if images * strips > 1:

            @pl.when(is_revisited)
            def _():
                for fetch in fetches(entry):
                    fetch.wait()
                for_each(bins[0] * bins[1], functools.partial(_merge, buffers))

        @pl.when(entry > strip.first)
        def _():
            for send in sends(entry - 1):
                send.wait()

        empty_key = _empty_key(record, strip, images, empty)
        for_each(bins[0] * bins[1], functools.partial(_finish, buffers, empty_key))
        for send in sends(entry):
            send.start()

    @pl.when(strip.first < strip.end)
    def _():
        def convert(row):
            scratch.keys[row, :width, :] = to_ordered(features[0, row], jnp.int32)

        for_each(jnp.minimum(rows, height - strip.top), convert)
        for_each_pack(strip, load_record, pool_pack)
        for send in sends(strip.end - 1):
            send.wait()


def _max_over_rows(
    tile: jax.Array, roi: RoI, strip: Strip, keys, buffers: list[Buffers], width: int, columns: int
) -> None:
    """Maxima, and cells, over the rows of eight rows of bins: `[lane block, 8 * column + p, 128]`.

    The cell is that of the row in the map.
    """
    channels = keys.shape[2]
    first, end = roi.all_cols()
    start, end = divide(first, SUBLANES), jnp.minimum(end, width)
    shape = (columns, channels)
    with_cells = len(buffers) == 2

    def bin_row(p):
        row_start, row_end = strip.clip(roi.rows(p))

        def some_columns(step):
            column = pl.multiple_of(start * SUBLANES + step * columns, SUBLANES)

            def row(r, best):
                key = keys[r, pl.ds(column, columns), :]
                if not with_cells:
                    return [jnp.maximum(best[0], key)]
                larger = key > best[0]
                return [jnp.where(larger, key, best[0]), jnp.where(larger, r, best[1])]

            best = [jnp.full(shape, NOTHING, jnp.int32), jnp.zeros(shape, jnp.int32)]
            best = lax.fori_loop(row_start, row_end, row, best[: len(buffers)])
            if with_cells:
                cell = (best[1] + strip.top) * width + column
                best[1] = cell + lax.broadcasted_iota(jnp.int32, shape, 0)
            at = pl.ds(column * SUBLANES + p - tile * SUBLANES, columns, stride=SUBLANES)
            for buffer, value in zip(buffers, best, strict=True):
                for block, lanes in enumerate(_lane_blocks(channels)):
                    buffer.over_rows[block, at, :] = value[:, lanes]

        for_each(divide(end - start * SUBLANES + columns - 1, columns), some_columns)

    for_each(jnp.minimum((tile + 1) * SUBLANES, roi.bins[0]), bin_row, tile * SUBLANES)


def _max_over_columns(tile: jax.Array, roi: RoI, member: jax.Array, buffers: list[Buffers]) -> None:
    """Maxima, and cells, over the columns of the bins: `[lane block, 8 * bin + member, 128]`."""
    lane_blocks = buffers[0].over_rows.shape[0]
    bin_cols = roi.bins[1]

    def bin_col(q):
        def column(w, best):
            at = pl.ds(pl.multiple_of(w * SUBLANES, SUBLANES), SUBLANES)
            others = [[x.over_rows[block, at, :] for block in range(lane_blocks)] for x in buffers]
            if len(buffers) == 1:
                return [tuple(map(jnp.maximum, best[0], others[0]))]
            (key, cell), (other_key, other_cell) = best, others
            pairs = zip(key, cell, strict=True), zip(other_key, other_cell, strict=True)
            merged = map(first_maximum, *pairs)
            return list(zip(*merged, strict=True))

        none = [jnp.full((SUBLANES, LANES), value, jnp.int32) for value in (NOTHING, NO_CELL)]
        best = [(value,) * lane_blocks for value in none[: len(buffers)]]
        col_start, col_end = roi.cols(q)
        best = lax.fori_loop(col_start, col_end, column, best)
        first = (tile * SUBLANES * bin_cols + q) * PACK + member
        at = pl.ds(first, SUBLANES, stride=bin_cols * PACK)
        for buffer, values in zip(buffers, best, strict=True):
            for block, value in enumerate(values):
                buffer.over_both[block, at, :] = value

    for_each(bin_cols, bin_col)


def _merge(buffers: list[Buffers], i: jax.Array) -> None:
    """Bin `i` of a pack, with what strips before this one have given."""
    at = pl.ds(pl.multiple_of(i * PACK, PACK), PACK)
    maxima = buffers[0]
    negative_zero = np.iinfo(np.int32).min >> (32 - 8 * maxima.merged.dtype.itemsize)
    for block, lanes in enumerate(_lane_blocks(maxima.merged.shape[2])):
        earlier = maxima.merged[i, :, lanes]
        is_nothing = to_bits(earlier, jnp.int32) == negative_zero
        earlier = jnp.where(is_nothing, NOTHING, to_ordered(earlier, jnp.int32))
        key = maxima.over_both[block, at, :]
        wins = earlier >= key  # among equals the cell further up
        maxima.over_both[block, at, :] = jnp.where(wins, earlier, key)
        for cells in buffers[1:]:
            cell = cells.merged[i, :, lanes].astype(jnp.int32)
            cells.over_both[block, at, :] = jnp.where(wins, cell, cells.over_both[block, at, :])


def _empty_key(record: Record, strip: Strip, images: int, empty: int) -> jax.Array:
    """The key of a bin without cells, or NOTHING if the pack goes on: `[8, 128]`.

    It is `empty`, or 0 if the RoI has no image.
    """
    key = jnp.zeros((PACK, LANES), jnp.int32)
    if empty != 0:
        member = lax.broadcasted_iota(jnp.int32, key.shape, 0)
        for m in range(PACK):
            is_empty = (member == m) & has_image(record.roi(m).image, images)
            key = jnp.where(is_empty, empty, key)
    return jnp.where(strip.unit == record.last_unit, key, NOTHING)


def _finish(buffers: list[Buffers], empty_key: jax.Array, i: jax.Array) -> None:
    """Bin `i` of a pack, from keys to what it pools to."""
    at = pl.ds(pl.multiple_of(i * PACK, PACK), PACK)
    maxima = buffers[0]
    for block, lanes in enumerate(_lane_blocks(maxima.to_send.shape[2])):
        key = maxima.over_both[block, at, :]
        found = key > NOTHING
        pooled = from_ordered(jnp.where(found, key, empty_key), maxima.to_send.dtype)
        maxima.to_send[i, :, lanes] = pooled
        for cells in buffers[1:]:
            cell = jnp.where(found, cells.over_both[block, at, :], -1)
            cells.to_send[i, :, lanes] = cell.astype(cells.to_send.dtype)


def _lane_blocks(channels: int) -> list[slice]:
    return [slice(start, start + LANES) for start in range(0, channels, LANES)]
