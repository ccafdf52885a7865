"""The TPU kernel for `scatter_at_argmax`.

A strip of the gradient stays in VMEM, in float32. Each RoI of each pack on its list adds every
bin's cotangent where the bin's argmax is: for each row and column of the bin, a vector compares
the cells' own indices with the argmax. The order of the sums is the order of the RoIs.

What one call moves: every strip once, and a pack's cotangents and argmaxes once for each strip that
it is on the list of.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_roipool._backends.tpu import schedule
from jax_roipool._backends.tpu.schedule import PACK, SUBLANES, Blocks, round_up
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


def blocks(cotangent, map_shape) -> Blocks | None:
    """How to cut the maps, or None if it cannot be done."""
    groups, rois, bin_rows, bin_cols, channels = cotangent.shape
    width = map_shape[2]
    sent_width = 2 * round_up(width, 2 * SUBLANES) * cotangent.dtype.itemsize
    bins = 2 * (SLOTS + 1) * bin_rows * bin_cols * PACK * 4

    def vmem(blocks: Blocks) -> int:
        strip = blocks.rows * (sent_width + blocks.padded(width) * 4)
        return blocks.channels * (strip + bins)

    return schedule.blocks((groups, *map_shape, channels), rois, vmem)


def scatter_at_argmax(cotangent, argmax, rectangles, blocks, *, map_shape, interpret):
    """Each cotangent added at its argmax, none where it is -1: `[G, n, H, W, C]`."""
    groups, rois, bin_rows, bin_cols, channels = cotangent.shape
    images, height, width = map_shape
    strips, block = blocks.strips, blocks.channels
    work = schedule.work(rectangles, images, blocks)
    cotangent, argmax = schedule.to_packs(cotangent), schedule.to_packs(argmax)

    bins = (bin_rows * bin_cols, PACK, block)
    scratch = [
        pltpu.SMEM((SLOTS, *work.records.shape[1:]), jnp.int32),
        pltpu.SemaphoreType.DMA((SLOTS,)),
        pltpu.VMEM((blocks.rows, blocks.padded(width), block), jnp.float32),
    ]
    for operand, wide in ((cotangent, jnp.float32), (argmax, jnp.int32)):
        scratch += [
            pltpu.VMEM((SLOTS, *bins), operand.dtype),
            pltpu.SemaphoreType.DMA((SLOTS,)),
            pltpu.VMEM(bins, wide),
        ]

    any_memory = pl.BlockSpec(memory_space=pl.ANY)
    shape = (groups * images, height, width, cotangent.shape[3])
    gradient = result_of((cotangent, argmax, *rectangles), shape, cotangent.dtype)
    call = pl.pallas_call(
        functools.partial(
            _kernel,
            images=images,
            strips=strips,
            bins=(bin_rows, bin_cols),
            columns=blocks.columns,
        ),
        name="roi_pool_gradient",
        out_shape=gradient,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(shape[3] // block, groups * images, strips),
            in_specs=[
                pl.BlockSpec(
                    (1, 1, work.entries.shape[2]),
                    lambda _, image, *__: (divide(image, images), ZERO, ZERO),
                    memory_space=pltpu.SMEM,
                ),
                any_memory,
                any_memory,
                any_memory,
            ],
            out_specs=pl.BlockSpec(
                (1, blocks.rows, width, block),
                lambda channel_block, image, strip, *_: (image, strip, ZERO, channel_block),
            ),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=groups * rois * height * width * channels,
            bytes_accessed=schedule.bytes_of(work.records, cotangent, argmax, gradient),
            transcendentals=0,
        ),
        interpret=interpret,
    )
    summed = call(work.offsets, work.entries, work.records, cotangent, argmax)
    return summed[..., :channels].reshape(groups, *map_shape, channels)


def _kernel(
    offsets,
    entries,
    records,
    cotangents,
    argmaxes,
    gradient,
    record_buffer,
    record_arrived,
    sums,
    cotangent_buffer,
    cotangent_arrived,
    cotangent,
    argmax_buffer,
    argmax_arrived,
    argmax,
    *,
    images,
    strips,
    bins,
    columns,
):
    _, rows, width, channels = gradient.shape
    strip = Strip(offsets, images, strips, rows)

    def clear(row):
        sums[row] = jnp.zeros(sums.shape[1:], sums.dtype)

    for_each(rows, clear)

    def loads(entry, slot):
        pack = entries[0, 0, entry]
        here = functools.partial(bins_of, group=strip.group, pack=pack, channels=channels)
        record = strip.group * (cotangents.shape[2] // PACK) + pack
        return [
            pltpu.make_async_copy(source, buffer.at[slot], arrived.at[slot])
            for source, buffer, arrived in (
                (records.at[record], record_buffer, record_arrived),
                (here(cotangents), cotangent_buffer, cotangent_arrived),
                (here(argmaxes), argmax_buffer, argmax_arrived),
            )
        ]

    def add_pack(entry, slot):
        del entry

        def widen(i):
            cotangent[i] = cotangent_buffer[slot, i].astype(jnp.float32)
            argmax[i] = argmax_buffer[slot, i].astype(jnp.int32)

        for_each(bins[0] * bins[1], widen)

        def add_roi(member):
            roi = Record(record_buffer.at[slot], bins).roi(member)

            @pl.when(strip.meets(roi))
            def _():
                def add_bin(i):
                    p, q = divide(i, bins[1]), remainder(i, bins[1])
                    at = (i, pl.ds(member, 1), slice(None))
                    _add(
                        sums,
                        cotangent[at],
                        argmax[at],
                        roi.rows(p),
                        roi.cols(q),
                        strip,
                        width,
                        columns,
                    )

                for_each(bins[0] * bins[1], add_bin)

        for_each(PACK, add_roi)

    @pl.when(strip.first < strip.end)
    def _():
        take_turns(strip, loads, add_pack)

    def finish(row):
        gradient[0, row] = sums[row, :width, :].astype(gradient.dtype)

    for_each(rows, finish)


def _add(sums, cotangent, argmax, rows, cols, strip, width, columns):
    """A bin's cotangent, `[1, C]`, added to the sums at its argmax."""
    row_start, row_end = strip.clip(rows)
    start = divide(cols[0], SUBLANES)
    shape = (columns, sums.shape[2])

    def some_columns(step):
        column = pl.multiple_of(start * SUBLANES + step * columns, SUBLANES)
        # What the index of a row's first cell is where the argmax is in that row.
        row_of = argmax - column - lax.broadcasted_iota(jnp.int32, shape, 0)

        def row(r):
            at = (r, pl.ds(column, columns), slice(None))
            sums[at] += jnp.where(row_of == (r + strip.top) * width, cotangent, 0.0)

        for_each(row_end, row, row_start)

    for_each(divide(cols[1] - start * SUBLANES + columns - 1, columns), some_columns)
