"""The TPU kernel for `rectangle_max`.

A strip of the map is in VMEM as keys (`keys.py`). For each RoI on its list, and for eight rows of
bins at a time, the maxima go

1. over the rows of a bin, for all columns of the RoI, eight columns to a vector; each vector is
   stored so that bin rows come to lie where the columns lay;
2. over the columns of a bin, for eight rows of bins at once.

Beside a maximum goes its cell, the smallest of equals, as it is the first in row-major order. A
RoI that reaches into several strips is pooled in each, and what it had is fetched and merged.

What one call moves: every strip once (none without RoIs) and every output once; for each border
between strips that a RoI crosses, its output twice more.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_roipool._backends.keys import from_key, to_key
from jax_roipool._backends.tpu import schedule
from jax_roipool._backends.tpu.schedule import LANES, SUBLANES, Blocks, round_up
from jax_roipool._backends.tpu.turns import SLOTS, Record, at_bins, copy, strip_index, take_turns

LOWEST = np.iinfo(np.int32).min
"""Below every key: nothing found yet."""


def blocks(features, bin_rows: int, bin_cols: int) -> Blocks | None:
    """How to cut the maps, or None if they cannot be cut to fit."""
    _, _, height, width, channels = features.shape
    itemsize = features.dtype.itemsize
    widest = round_up(width, 4 * SUBLANES) + 4 * SUBLANES
    bins = round_up(bin_rows, SUBLANES) * round_up(bin_cols, 2 * SUBLANES)
    return schedule.blocks(
        height,
        channels,
        bytes_per_row=widest * (itemsize + 4),
        bytes_besides=4 * (2 * widest * SUBLANES + 2 * bins + 2 * SLOTS * bins),
    )


def rectangle_max(features, rectangles, blocks, *, argmax_dtype, empty_value, interpret):
    """Maxima, and argmaxes if asked for: `[G, K, P, Q, C]`."""
    groups, images, height, width, channels = features.shape
    rois, bin_rows, bin_cols = *rectangles[1].shape[1:], rectangles[3].shape[2]
    strips, lanes = blocks.strips, blocks.lanes
    work = schedule.work(rectangles, images, blocks)

    bins = (bin_rows, bin_cols, channels)
    results = [jax.ShapeDtypeStruct((groups * rois, *bins), features.dtype)]
    if argmax_dtype:
        results.append(jax.ShapeDtypeStruct((groups * rois, *bins), argmax_dtype))
    tiles, lane_blocks = pl.cdiv(bin_rows, SUBLANES), lanes // LANES
    over_rows = (lane_blocks, blocks.padded(width) * SUBLANES, LANES)
    over_both = (tiles, lane_blocks, bin_cols * SUBLANES, LANES)
    scratch = [
        pltpu.SMEM((SLOTS, *work.records.shape[1:]), jnp.int32),
        pltpu.SemaphoreType.DMA((SLOTS,)),
        pltpu.VMEM((blocks.rows, blocks.padded(width), lanes), jnp.int32),
    ]
    for result in results:
        scratch += [pltpu.VMEM(shape, jnp.int32) for shape in (over_rows, over_both)]
        scratch.append(pltpu.VMEM((SLOTS, bin_rows, bin_cols, blocks.channels), result.dtype))
        scratch.append(pltpu.SemaphoreType.DMA((SLOTS,)))

    def strip_to_fetch(image, block, strip, fetched, *_):
        unit = fetched[image * strips + strip]
        other, last_block = lax.div(unit, strips), channels // blocks.channels - 1
        block = jnp.where(other == image, block, last_block)
        return other, lax.rem(unit, strips), 0, block

    feature_block = (1, blocks.rows, width, blocks.channels)
    any_memory = pl.BlockSpec(memory_space=pl.ANY)
    call = pl.pallas_call(
        functools.partial(
            _kernel,
            images=images,
            strips=strips,
            height=height,
            rois=rois,
            empty_value=empty_value,
            bins=(bin_rows, bin_cols),
            columns=blocks.columns,
        ),
        name="roi_pool",
        out_shape=results,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(groups * images, channels // blocks.channels, strips),
            in_specs=[
                pl.BlockSpec(
                    (1, 1, work.entries.shape[2]),
                    lambda image, *_: (lax.div(image, images), 0, 0),
                    memory_space=pltpu.SMEM,
                ),
                any_memory,
                pl.BlockSpec(feature_block, strip_to_fetch, pipeline_mode=pl.Buffered(1)),
            ],
            out_specs=[any_memory] * len(results),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=groups * rois * height * width * channels,
            bytes_accessed=features.nbytes
            + work.records.nbytes
            + sum(result.size * result.dtype.itemsize for result in results),
            transcendentals=0,
        ),
        interpret=interpret,
    )
    maps = features.reshape(groups * images, height, width, channels)
    pooled = call(work.fetched, work.offsets, work.entries, work.records, maps)
    return [x.reshape(groups, rois, *bins) for x in pooled]


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
    rois,
    bins,
    columns,
    empty_value,
):
    del fetched
    results = refs[: (len(refs) - 3) // 5]
    record_buffer, record_arrived, keys, *buffers = refs[len(results) :]
    # For the maximum, and for its cell if that is wanted: over rows, over columns as well, on the
    # way to the result, and whether it has gone.
    over_rows, over_both, staged, sent = (buffers[i::4] for i in range(4))
    with_cells = len(results) == 2
    _, rows, width, channels = features.shape
    lanes = keys.shape[2]

    group, unit = strip_index(images, strips)
    units = images * strips
    first = offsets[group * (units + 1) + unit]
    end = offsets[group * (units + 1) + unit + 1]
    top = pl.program_id(2) * rows  # the strip's first row

    def roi_at(entry):
        return group * rois + entries[0, 0, entry]

    def load_record(entry, slot):
        source = records.at[roi_at(entry)]
        return [copy(source, record_buffer.at[slot], record_arrived.at[slot])]

    def copies(entry, slot, to_result):
        for result, stage, semaphore in zip(results, staged, sent, strict=True):
            far = at_bins(result, roi_at(entry), channels)
            near = stage.at[slot]
            yield copy(near, far, semaphore.at[slot]) if to_result else copy(
                far, near, semaphore.at[slot]
            )

    def pool(entry, slot):
        roi = Record(record_buffer.at[slot], *bins)
        continues = roi.rows(0)[0] < top

        @pl.when(entry - first >= SLOTS)
        def _():
            for sending in copies(entry - SLOTS, slot, True):
                sending.wait()

        if strips > 1:

            @pl.when(continues)
            def _():
                for fetching in copies(entry, slot, False):
                    fetching.start()

        def bin_rows_at(p, _):
            _max_over_rows(p, roi, keys, over_rows, top, width, columns)
            _max_over_columns(p, roi, over_rows, over_both)
            return 0

        lax.fori_loop(0, pl.cdiv(bins[0], SUBLANES), bin_rows_at, 0)

        if strips > 1:

            @pl.when(continues)
            def _():
                for fetching in copies(entry, slot, False):
                    fetching.wait()

        empty = jnp.where(roi.valid, jnp.float32(empty_value), 0.0)
        lax.fori_loop(0, bins[0], functools.partial(finish, roi, slot, empty), 0)
        for sending in copies(entry, slot, True):
            sending.start()

    def finish(roi, slot, empty, p, _):
        had_rows = roi.rows(p)[0] < top
        tile, sublane = lax.div(p, SUBLANES), lax.rem(p, SUBLANES)
        at = pl.ds(sublane, bins[1], stride=SUBLANES)
        for block in range(lanes // LANES):
            own = slice(block * LANES, min((block + 1) * LANES, channels))
            size = own.stop - own.start
            key, *cell = (ref[tile, block, at, :][:, :size] for ref in over_both)
            if strips > 1:
                before = _as_keys(staged[0][slot, p, :, own])
                before = jnp.where(had_rows, before, LOWEST)
                wins = before >= key  # among equals the cell further up
                key = jnp.where(wins, before, key)
                if with_cells:
                    cell = [jnp.where(wins, staged[1][slot, p, :, own].astype(jnp.int32), cell[0])]
            found = key > LOWEST
            pooled = jnp.where(found, from_key(key, np.dtype(np.float32)), empty)
            staged[0][slot, p, :, own] = pooled.astype(staged[0].dtype)
            if with_cells:
                cell = jnp.where(found, cell[0], -1)
                staged[1][slot, p, :, own] = cell.astype(staged[1].dtype)
        return 0

    @pl.when(first < end)
    def _():
        def convert(row, _):
            keys[row, :width, :channels] = _as_keys(features[0, row])
            return 0

        lax.fori_loop(0, jnp.minimum(rows, height - top), convert, 0)
        take_turns(first, end, load_record, pool)
        for back in (1, 2):

            @pl.when(end - first >= back)
            def _(entry=end - back):
                for sending in copies(entry, lax.rem(entry - first, SLOTS), True):
                    sending.wait()


def _as_keys(features):
    return to_key(features.astype(jnp.float32))


def _max_over_rows(tile, roi, keys, over_rows, top, width, columns):
    """Maxima, and cells, over the rows of eight bin rows: `[lane block, 8 * column + p, 128]`."""
    rows, _, lanes = keys.shape
    start = lax.div(roi.cols(0)[0], SUBLANES)
    end = roi.cols(roi.bin_cols - 1)[1]
    steps = lax.div(end - start * SUBLANES + columns - 1, columns)
    shape = (columns, lanes)
    with_cells = len(over_rows) == 2

    def bin_row(p, _):
        row_start, row_end = roi.rows(p)
        row_start, row_end = jnp.maximum(row_start - top, 0), jnp.minimum(row_end - top, rows)

        def some_columns(step, _):
            column = pl.multiple_of(start * SUBLANES + step * columns, SUBLANES)

            def row(r, best):
                key = keys[r, pl.ds(column, columns), :]
                if not with_cells:
                    return [jnp.maximum(best[0], key)]
                larger = key > best[0]
                return [jnp.where(larger, key, best[0]), jnp.where(larger, r, best[1])]

            best = [jnp.full(shape, LOWEST, jnp.int32), jnp.zeros(shape, jnp.int32)]
            best = lax.fori_loop(row_start, row_end, row, best[: len(over_rows)])
            if with_cells:
                cell = (best[1] + top) * width + column
                best[1] = cell + lax.broadcasted_iota(jnp.int32, shape, 0)
            for ref, value in zip(over_rows, best, strict=True):
                for block in range(lanes // LANES):
                    position = column * SUBLANES + p - tile * SUBLANES
                    ref[block, pl.ds(position, columns, stride=SUBLANES), :] = value[
                        :, block * LANES : (block + 1) * LANES
                    ]
            return 0

        return lax.fori_loop(0, steps, some_columns, 0)

    tile_end = jnp.minimum((tile + 1) * SUBLANES, roi.bin_rows)
    lax.fori_loop(tile * SUBLANES, tile_end, bin_row, 0)


def _max_over_columns(tile, roi, over_rows, over_both):
    """Maxima, and cells, over the columns of every bin of eight bin rows: `[tile, lane block, 8 * q + p, 128]`."""
    lane_blocks = over_rows[0].shape[0]
    shape = (SUBLANES, LANES)

    def bin_col(q, _):
        def column(w, best):
            at = pl.ds(pl.multiple_of(w * SUBLANES, SUBLANES), SUBLANES)
            keys = [over_rows[0][block, at, :] for block in range(lane_blocks)]
            if len(over_rows) == 1:
                return [[jnp.maximum(a, b) for a, b in zip(best[0], keys, strict=True)]]
            merged = [
                _first_maximum(best[0][block], best[1][block], key, over_rows[1][block, at, :])
                for block, key in enumerate(keys)
            ]
            return [list(side) for side in zip(*merged, strict=True)]

        initial = [jnp.full(shape, value, jnp.int32) for value in (LOWEST, np.iinfo(np.int32).max)]
        best = [[value] * lane_blocks for value in initial[: len(over_rows)]]
        best = lax.fori_loop(*roi.cols(q), column, best)
        at = pl.ds(pl.multiple_of(q * SUBLANES, SUBLANES), SUBLANES)
        for ref, values in zip(over_both, best, strict=True):
            for block, value in enumerate(values):
                ref[tile, block, at, :] = value
        return 0

    lax.fori_loop(0, roi.bin_cols, bin_col, 0)


def _first_maximum(key, cell, other_key, other_cell):
    other_wins = (other_key > key) | ((other_key == key) & (other_cell < cell))
    return jnp.where(other_wins, other_key, key), jnp.where(other_wins, other_cell, cell)
