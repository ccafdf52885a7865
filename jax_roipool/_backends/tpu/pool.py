"""The TPU kernel for `rectangle_max`.

A strip of the map is in VMEM as keys (`keys.py`). For each RoI of a pack, and for eight rows of
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

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_roipool._backends.keys import from_key, to_key
from jax_roipool._backends.tpu import schedule
from jax_roipool._backends.tpu.schedule import LANES, PACK, SUBLANES, Blocks, round_up
from jax_roipool._backends.tpu.turns import (
    SLOTS,
    ZERO,
    Record,
    Strip,
    bins_of,
    divide,
    for_each,
    remainder,
    take_turns,
)
from jax_roipool._manual_axes import result_of

NOTHING = np.iinfo(np.int32).min
"""Below every key: no cell found yet. As a float it is -0, which no key becomes."""

NO_CELL = np.iinfo(np.int32).max


def blocks(features, rectangles) -> Blocks | None:
    """How to cut the maps, or None if it cannot be done."""
    width, rois = features.shape[3], rectangles[0].shape[1]
    bin_rows, bin_cols = rectangles[1].shape[2], rectangles[3].shape[2]
    fetched_width = round_up(width, 2 * SUBLANES) * features.dtype.itemsize
    bins = bin_cols * PACK * 4
    over_both, staged = round_up(bin_rows, SUBLANES) * bins, bin_rows * bins

    def vmem(blocks: Blocks) -> int:
        padded_width = blocks.padded(width) * 4
        strip = blocks.rows * (fetched_width + padded_width)
        return blocks.channels * (strip + 2 * (padded_width * SUBLANES + over_both + 2 * staged))

    return schedule.blocks(features.shape, rois, vmem)


def rectangle_max(features, rectangles, blocks, *, argmax_dtype, empty_value, interpret):
    """Maxima, and argmaxes if asked for: `[G, K, P, Q, C]`."""
    groups, images, height, width, channels = features.shape
    rois, bin_rows, bin_cols = *rectangles[1].shape[1:], rectangles[3].shape[2]
    strips, block = blocks.strips, blocks.channels
    work = schedule.work(rectangles, images, blocks)
    features = schedule.pad_channels(features.reshape(groups * images, *features.shape[2:]))

    shape = (groups, rois, bin_rows, bin_cols, channels)
    dtypes = [features.dtype, argmax_dtype] if argmax_dtype else [features.dtype]
    results = [
        result_of((features, *rectangles), schedule.packs_shape(shape), dtype) for dtype in dtypes
    ]
    over_rows = (block // LANES, blocks.padded(width) * SUBLANES, LANES)
    over_both = (block // LANES, round_up(bin_rows, SUBLANES) * bin_cols * PACK, LANES)
    bins = (bin_rows * bin_cols, PACK, block)
    scratch = [
        pltpu.SMEM((SLOTS, *work.records.shape[1:]), jnp.int32),
        pltpu.SemaphoreType.DMA((SLOTS,)),
        pltpu.VMEM((blocks.rows, blocks.padded(width), block), jnp.int32),
    ]
    for result in results:
        scratch += [
            pltpu.VMEM(over_rows, jnp.int32),
            pltpu.VMEM(over_both, jnp.int32),
            pltpu.VMEM(bins, result.dtype),
            pltpu.SemaphoreType.DMA(()),
            pltpu.VMEM(bins, result.dtype),
            pltpu.SemaphoreType.DMA(()),
        ]

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
            bins=(bin_rows, bin_cols),
            columns=blocks.columns,
            empty_value=empty_value,
        ),
        name="roi_pool",
        out_shape=results,
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
            out_specs=[any_memory] * len(results),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(
                "parallel",
                "parallel" if images == 1 else "arbitrary",  # a pack can have RoIs of several
                "arbitrary",
            )
        ),
        cost_estimate=pl.CostEstimate(
            flops=groups * rois * height * width * channels,
            bytes_accessed=schedule.bytes_of(features, work.records, *results),
            transcendentals=0,
        ),
        interpret=interpret,
    )
    pooled = call(work.fetched, work.offsets, work.entries, work.records, features)
    return [schedule.from_packs(x, shape) for x in pooled]


def _kernel(
    fetched,
    offsets,
    entries,
    records,
    features,
    *refs,
    images,
    strips,
    height,
    bins,
    columns,
    empty_value,
):
    del fetched
    # Each result comes with six buffers; the result is the maxima, and their cells if wanted.
    results = refs[: (len(refs) - 3) // 7]
    record_buffer, record_arrived, keys, *buffers = refs[len(results) :]
    over_rows, over_both, staged, sent, before, arrived = (buffers[i::6] for i in range(6))
    _, rows, width, channels = features.shape
    strip = Strip(offsets, images, strips, rows)

    def load_record(entry, slot):
        record = strip.group * (results[0].shape[2] // PACK) + entries[0, 0, entry]
        return [
            pltpu.make_async_copy(
                records.at[record], record_buffer.at[slot], record_arrived.at[slot]
            )
        ]

    def sends(entry):
        for result, stage, semaphore in zip(results, staged, sent, strict=True):
            there = bins_of(result, strip.group, entries[0, 0, entry], channels)
            yield pltpu.make_async_copy(stage, there, semaphore)

    def fetches(entry):
        for result, stage, semaphore in zip(results, before, arrived, strict=True):
            there = bins_of(result, strip.group, entries[0, 0, entry], channels)
            yield pltpu.make_async_copy(there, stage, semaphore)

    def pool_pack(entry, slot):
        record = Record(record_buffer.at[slot], bins)
        has_been = strip.unit != record.first_unit
        if images * strips > 1:

            @pl.when(has_been)
            def _():
                for fetch in fetches(entry):
                    fetch.start()

        def clear(i):
            at = pl.ds(pl.multiple_of(i * PACK, PACK), PACK)
            for block in range(channels // LANES):
                over_both[0][block, at, :] = jnp.full((PACK, LANES), NOTHING, jnp.int32)

        for_each(over_both[0].shape[1] // PACK, clear)

        def pool_roi(member):
            roi = record.roi(member)

            @pl.when(strip.meets(roi))
            def _():
                def tile(t):
                    _max_over_rows(t, roi, strip, keys, over_rows, width, columns)
                    _max_over_columns(t, roi, member, over_rows, over_both)

                for_each(pl.cdiv(bins[0], SUBLANES), tile)

        for_each(PACK, pool_roi)

        if images * strips > 1:

            @pl.when(has_been)
            def _():
                for fetch in fetches(entry):
                    fetch.wait()
                for_each(bins[0] * bins[1], functools.partial(_merge, before, over_both))

        @pl.when(entry > strip.first)
        def _():
            for send in sends(entry - 1):
                send.wait()

        empty = _empty_key(record, strip, empty_value)
        for_each(bins[0] * bins[1], functools.partial(_finish, over_both, empty, staged))
        for send in sends(entry):
            send.start()

    @pl.when(strip.first < strip.end)
    def _():
        def convert(row):
            keys[row, :width, :] = to_key(features[0, row].astype(jnp.float32))

        for_each(jnp.minimum(rows, height - strip.top), convert)
        take_turns(strip, load_record, pool_pack)
        for send in sends(strip.end - 1):
            send.wait()


def _max_over_rows(tile, roi, strip, keys, over_rows, width, columns):
    """Maxima, and cells, over the rows of eight rows of bins: `[lane block, 8 * column + p, 128]`.

    The cell is that of the row in the map.
    """
    channels = keys.shape[2]
    start = divide(roi.cols(0)[0], SUBLANES)
    end = roi.cols(roi.bins[1] - 1)[1]
    shape = (columns, channels)
    with_cells = len(over_rows) == 2

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
            best = lax.fori_loop(row_start, row_end, row, best[: len(over_rows)])
            if with_cells:
                cell = (best[1] + strip.top) * width + column
                best[1] = cell + lax.broadcasted_iota(jnp.int32, shape, 0)
            at = pl.ds(column * SUBLANES + p - tile * SUBLANES, columns, stride=SUBLANES)
            for ref, value in zip(over_rows, best, strict=True):
                for block, lanes in enumerate(_lane_blocks(channels)):
                    ref[block, at, :] = value[:, lanes]

        for_each(divide(end - start * SUBLANES + columns - 1, columns), some_columns)

    for_each(jnp.minimum((tile + 1) * SUBLANES, roi.bins[0]), bin_row, tile * SUBLANES)


def _max_over_columns(tile, roi, member, over_rows, over_both):
    """Maxima, and cells, over the columns of the bins: `[lane block, 8 * bin + member, 128]`."""
    lane_blocks = over_rows[0].shape[0]
    bin_cols = roi.bins[1]

    def bin_col(q):
        def column(w, best):
            at = pl.ds(pl.multiple_of(w * SUBLANES, SUBLANES), SUBLANES)
            others = [[ref[block, at, :] for block in range(lane_blocks)] for ref in over_rows]
            if len(over_rows) == 1:
                return [tuple(map(jnp.maximum, best[0], others[0]))]
            (key, cell), (other_key, other_cell) = best, others
            merged = map(_first_maximum, key, cell, other_key, other_cell)
            return list(zip(*merged, strict=True))

        none = [jnp.full((SUBLANES, LANES), value, jnp.int32) for value in (NOTHING, NO_CELL)]
        best = [(value,) * lane_blocks for value in none[: len(over_rows)]]
        col_start, col_end = roi.cols(q)
        best = lax.fori_loop(col_start, col_end, column, best)
        first = (tile * SUBLANES * bin_cols + q) * PACK + member
        at = pl.ds(first, SUBLANES, stride=bin_cols * PACK)
        for ref, values in zip(over_both, best, strict=True):
            for block, value in enumerate(values):
                ref[block, at, :] = value

    for_each(bin_cols, bin_col)


def _first_maximum(key, cell, other_key, other_cell):
    other_wins = (other_key > key) | ((other_key == key) & (other_cell < cell))
    return jnp.where(other_wins, other_key, key), jnp.where(other_wins, other_cell, cell)


def _merge(before, over_both, i):
    """Bin `i` of a pack, with what strips before this one have given."""
    at = pl.ds(pl.multiple_of(i * PACK, PACK), PACK)
    for block, lanes in enumerate(_lane_blocks(before[0].shape[2])):
        had = before[0][i, :, lanes].astype(jnp.float32)
        nothing = lax.bitcast_convert_type(had, jnp.int32) == NOTHING
        had = jnp.where(nothing, NOTHING, to_key(had))
        key = over_both[0][block, at, :]
        wins = had >= key  # among equals the cell further up
        over_both[0][block, at, :] = jnp.where(wins, had, key)
        if len(before) == 2:
            cell = before[1][i, :, lanes].astype(jnp.int32)
            over_both[1][block, at, :] = jnp.where(wins, cell, over_both[1][block, at, :])


def _empty_key(record, strip, empty_value):
    """What a bin without cells gives, or NOTHING if the pack goes on, as keys `[8, 128]`."""
    key = jnp.zeros((PACK, LANES), jnp.int32)
    if empty_value != 0:
        member = lax.broadcasted_iota(jnp.int32, key.shape, 0)
        lowest = to_key(jnp.float32(empty_value))
        for m in range(PACK):
            has_image = record.roi(m).image >= 0
            key = jnp.where((member == m) & has_image, lowest, key)
    return jnp.where(strip.unit == record.last_unit, key, NOTHING)


def _finish(over_both, empty_key, staged, i):
    """Bin `i` of a pack, from keys to what it pools to."""
    at = pl.ds(pl.multiple_of(i * PACK, PACK), PACK)
    for block, lanes in enumerate(_lane_blocks(staged[0].shape[2])):
        key = over_both[0][block, at, :]
        found = key > NOTHING
        pooled = from_key(jnp.where(found, key, empty_key), np.dtype(np.float32))
        staged[0][i, :, lanes] = pooled.astype(staged[0].dtype)
        if len(staged) == 2:
            cell = jnp.where(found, over_both[1][block, at, :], -1)
            staged[1][i, :, lanes] = cell.astype(staged[1].dtype)


def _lane_blocks(channels):
    return [slice(start, start + LANES) for start in range(0, channels, LANES)]
