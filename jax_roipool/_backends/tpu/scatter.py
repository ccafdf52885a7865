"""The TPU kernel for `scatter_at_argmax`.

A strip of the gradient stays in VMEM, in float32. Each RoI on its list adds every bin's cotangent
where the bin's argmax is: for each row and column of the bin, a vector compares the cells' own
indices with the argmax. The order of the sums is the order of the list.

What one call moves: every strip once, and a RoI's cotangents and argmaxes once for each strip that
it reaches into.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_roipool._backends.tpu import schedule
from jax_roipool._backends.tpu.schedule import SUBLANES, Blocks, round_up
from jax_roipool._backends.tpu.turns import SLOTS, Record, at_bins, copy, strip_index, take_turns


def blocks(cotangent, map_shape) -> Blocks | None:
    """How to cut the maps, or None if they cannot be cut to fit."""
    _, _, bin_rows, bin_cols, channels = cotangent.shape
    _, height, width = map_shape
    widest = round_up(width, 4 * SUBLANES) + 4 * SUBLANES
    bins = bin_rows * round_up(bin_cols, 2 * SUBLANES)
    return schedule.blocks(
        height,
        channels,
        bytes_per_row=widest * (4 + 2 * cotangent.dtype.itemsize),
        bytes_besides=4 * (2 * SLOTS * bins + 2 * bins),
    )


def scatter_at_argmax(cotangent, argmax, rectangles, blocks, *, map_shape, interpret):
    """Each cotangent added at its argmax, none where it is -1: `[G, n, H, W, C]`."""
    groups, rois, bin_rows, bin_cols, channels = cotangent.shape
    images, height, width = map_shape
    strips, lanes = blocks.strips, blocks.lanes
    work = schedule.work(rectangles, images, blocks)

    scratch = [
        pltpu.SMEM((SLOTS, *work.records.shape[1:]), jnp.int32),
        pltpu.SemaphoreType.DMA((SLOTS,)),
        pltpu.VMEM((blocks.rows, blocks.padded(width), lanes), jnp.float32),
    ]
    for operand, wide in ((cotangent, jnp.float32), (argmax, jnp.int32)):
        scratch.append(pltpu.VMEM((SLOTS, bin_rows, bin_cols, blocks.channels), operand.dtype))
        scratch.append(pltpu.SemaphoreType.DMA((SLOTS,)))
        scratch.append(pltpu.VMEM((bin_rows, bin_cols, lanes), wide))

    any_memory = pl.BlockSpec(memory_space=pl.ANY)
    gradient = jax.ShapeDtypeStruct((groups * images, height, width, channels), cotangent.dtype)
    call = pl.pallas_call(
        functools.partial(
            _kernel,
            images=images,
            strips=strips,
            rois=rois,
            columns=blocks.columns,
        ),
        name="roi_pool_gradient",
        out_shape=gradient,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(groups * images, channels // blocks.channels, strips),
            in_specs=[
                pl.BlockSpec(
                    (1, 1, work.entries.shape[2]),
                    lambda image, *_: (lax.div(image, images), 0, 0),
                    memory_space=pltpu.SMEM,
                ),
                any_memory,
                any_memory,
                any_memory,
            ],
            out_specs=pl.BlockSpec(
                (1, blocks.rows, width, blocks.channels),
                lambda image, block, strip, *_: (image, strip, 0, block),
            ),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=groups * rois * height * width * channels,
            bytes_accessed=cotangent.nbytes
            + argmax.nbytes
            + work.records.nbytes
            + gradient.size * gradient.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
    )
    bins = (groups * rois, bin_rows, bin_cols, channels)
    summed = call(
        work.offsets, work.entries, work.records, cotangent.reshape(bins), argmax.reshape(bins)
    )
    return summed.reshape(groups, *map_shape, channels)


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
    wide_cotangent,
    argmax_buffer,
    argmax_arrived,
    wide_argmax,
    *,
    images,
    strips,
    rois,
    columns,
):
    _, rows, width, channels = gradient.shape
    bins = cotangents.shape[1:3]
    group, unit = strip_index(images, strips)
    units = images * strips
    first = offsets[group * (units + 1) + unit]
    end = offsets[group * (units + 1) + unit + 1]
    top = pl.program_id(2) * rows

    def clear(row, _):
        sums[row] = jnp.zeros(sums.shape[1:], sums.dtype)
        return 0

    lax.fori_loop(0, rows, clear, 0)

    def loads(entry, slot):
        roi = group * rois + entries[0, 0, entry]
        return [
            copy(records.at[roi], record_buffer.at[slot], record_arrived.at[slot]),
            copy(
                at_bins(cotangents, roi, channels),
                cotangent_buffer.at[slot],
                cotangent_arrived.at[slot],
            ),
            copy(
                at_bins(argmaxes, roi, channels), argmax_buffer.at[slot], argmax_arrived.at[slot]
            ),
        ]

    def add(entry, slot):
        del entry
        roi = Record(record_buffer.at[slot], *bins)

        def bin_row(p, _):
            wide_cotangent[p, :, :channels] = cotangent_buffer[slot, p].astype(jnp.float32)
            wide_argmax[p, :, :channels] = argmax_buffer[slot, p].astype(jnp.int32)
            row_start, row_end = roi.rows(p)
            row_start = jnp.maximum(row_start - top, 0)
            row_end = jnp.minimum(row_end - top, rows)

            def bin_col(q, _):
                bin_argmax = wide_argmax[p, pl.ds(q, 1), :]
                bin_cotangent = wide_cotangent[p, pl.ds(q, 1), :]
                col_start, col_end = roi.cols(q)
                start = lax.div(col_start, SUBLANES)
                steps = lax.div(col_end - start * SUBLANES + columns - 1, columns)

                def some_columns(step, _):
                    column = pl.multiple_of(start * SUBLANES + step * columns, SUBLANES)
                    shape = (columns, sums.shape[2])
                    # Where the argmax is in the row whose first cell has this index.
                    row_of = bin_argmax - column - lax.broadcasted_iota(jnp.int32, shape, 0)

                    def row(r, _):
                        at = (r, pl.ds(column, columns), slice(None))
                        hit = row_of == (r + top) * width
                        sums[at] += jnp.where(hit, bin_cotangent, 0.0)
                        return 0

                    return lax.fori_loop(row_start, row_end, row, 0)

                return lax.fori_loop(0, steps, some_columns, 0)

            return lax.fori_loop(0, bins[1], bin_col, 0)

        lax.fori_loop(0, bins[0], bin_row, 0)

    @pl.when(first < end)
    def _():
        take_turns(first, end, loads, add)

    def finish(row, _):
        gradient[0, row] = sums[row, :width, :channels].astype(gradient.dtype)
        return 0

    lax.fori_loop(0, rows, finish, 0)
