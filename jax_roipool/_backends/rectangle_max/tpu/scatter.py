"""The TPU kernel for `scatter_at_argmax`.

A strip of the gradient stays in VMEM, in float32. Each RoI of each pack on its list adds every
bin's cotangent where the bin's argmax is: for each row and column of the bin, a vector compares
the cells' own indices with the argmax. The order of the sums is the order of the RoIs.

What one call moves: every strip once, and a pack's cotangents and argmaxes once for each strip that
it is on the list of.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_roipool._backends.rectangle_max.ordered import to_bits
from jax_roipool._backends.rectangle_max.tpu import schedule
from jax_roipool._backends.rectangle_max.tpu.pipeline import (
    SLOTS,
    ZERO,
    Record,
    Strip,
    bins_of,
    divide,
    for_each,
    for_each_pack,
    remainder,
)
from jax_roipool._backends.rectangle_max.tpu.schedule import PACK, SUBLANES, Blocks, round_up
from jax_roipool._manual_axes import result_of


class Bins(NamedTuple):
    """A pack's cotangents or argmaxes in VMEM."""

    arriving: Any  # [slots, bins, 8, C], of the operand's dtype
    arrived: Any  # semaphores
    wide: Any  # [bins, 8, C] of 32 bits


class Scratch(NamedTuple):
    """What the kernel has beside its operands and its result."""

    records: Any  # in SMEM
    records_arrived: Any  # semaphores
    sums: Any  # float32 [rows, columns, C], the strip in VMEM
    cotangent: Bins
    argmax: Bins


def blocks(cotangent, map_shape: tuple[int, int, int]) -> Blocks | None:
    """How to cut the maps, or None if it cannot be done."""
    groups, num_rois, bin_rows, bin_cols, channels = cotangent.shape
    width = map_shape[2]
    sent_width = 2 * round_up(width, 2 * SUBLANES) * cotangent.dtype.itemsize
    bins = 2 * (SLOTS + 1) * bin_rows * bin_cols * PACK * 4

    def vmem(blocks: Blocks) -> int:
        strip = blocks.rows * (sent_width + blocks.padded(width) * 4)
        return blocks.channels * (strip + bins)

    return schedule.blocks((groups, *map_shape, channels), num_rois, vmem)


def scatter_at_argmax(cotangent, argmax, edges, blocks, *, map_shape, interpret):
    """See `jax_roipool._backends.rectangle_max`."""
    groups, num_rois, bin_rows, bin_cols, channels = cotangent.shape
    output_size = bin_rows, bin_cols
    images, height, width = map_shape
    strips, block = blocks.strips, blocks.channels
    work = schedule.work(edges, output_size, images, blocks)
    cotangent, argmax = schedule.to_packs(cotangent), schedule.to_packs(argmax)

    def bins(dtype, wide_dtype):
        shape = (cotangent.shape[1], PACK, block)
        return Bins(
            arriving=pltpu.VMEM((SLOTS, *shape), dtype),
            arrived=pltpu.SemaphoreType.DMA((SLOTS,)),
            wide=pltpu.VMEM(shape, wide_dtype),
        )

    scratch = Scratch(
        records=pltpu.SMEM((SLOTS, *work.records.shape[1:]), jnp.int32),
        records_arrived=pltpu.SemaphoreType.DMA((SLOTS,)),
        sums=pltpu.VMEM((blocks.rows, blocks.padded(width), block), jnp.float32),
        cotangent=bins(cotangent.dtype, jnp.float32),
        argmax=bins(argmax.dtype, jnp.int32),
    )
    any_memory = pl.BlockSpec(memory_space=pl.ANY)
    shape = (groups * images, height, width, cotangent.shape[3])
    gradient = result_of((cotangent, argmax, edges), shape, cotangent.dtype)
    call = pl.pallas_call(
        functools.partial(
            _kernel,
            images=images,
            strips=strips,
            bins=output_size,
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
            scratch_shapes=[scratch],  # one argument of the kernel
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=groups * num_rois * height * width * channels,
            bytes_accessed=schedule.bytes_of(work.records, cotangent, argmax, gradient),
            transcendentals=0,
        ),
        interpret=interpret,
    )
    summed = call(work.offsets, work.entries, work.records, cotangent, argmax)
    return [summed[..., :channels].reshape(groups, *map_shape, channels)]


def _kernel(
    offsets,
    entries,
    records,
    cotangents,
    argmaxes,
    gradient,
    scratch: Scratch,
    *,
    images: int,
    strips: int,
    bins: tuple[int, int],
    columns: int,
):
    """One strip of an image's gradient `[1, rows, W, C]`, by the packs on its list."""
    _, rows, width, channels = gradient.shape
    strip = Strip(offsets, images, strips, rows)
    sums, cotangent, argmax = scratch.sums, scratch.cotangent, scratch.argmax

    def clear(row):
        sums[row] = jnp.zeros(sums.shape[1:], sums.dtype)

    for_each(rows, clear)

    def loads(entry, slot):
        pack = entries[0, 0, entry]
        of_pack = functools.partial(bins_of, group=strip.group, pack=pack, channels=channels)
        record = strip.group * (cotangents.shape[2] // PACK) + pack
        return [
            pltpu.make_async_copy(source, buffer.at[slot], arrived.at[slot])
            for source, buffer, arrived in (
                (records.at[record], scratch.records, scratch.records_arrived),
                (of_pack(cotangents), cotangent.arriving, cotangent.arrived),
                (of_pack(argmaxes), argmax.arriving, argmax.arrived),
            )
        ]

    def add_pack(entry, slot):
        del entry

        def widen(i):
            cotangent.wide[i] = as_float32(cotangent.arriving[slot, i])
            argmax.wide[i] = argmax.arriving[slot, i].astype(jnp.int32)

        for_each(bins[0] * bins[1], widen)

        def add_roi(member):
            roi = Record(scratch.records.at[slot], bins).roi(member)

            @pl.when(strip.meets(roi))
            def _():
                def add_bin(i):
                    p, q = divide(i, bins[1]), remainder(i, bins[1])
                    at = (i, pl.ds(member, 1), slice(None))
                    _add(
                        sums,
                        cotangent.wide[at],
                        argmax.wide[at],
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
        for_each_pack(strip, loads, add_pack)

    def finish(row):
        gradient[0, row] = sums[row, :width, :].astype(gradient.dtype)

    for_each(rows, finish)


def as_float32(values: jax.Array) -> jax.Array:
    """Float32 or bfloat16 as float32, by bits: a conversion may take a subnormal for zero."""
    if values.dtype == jnp.float32:
        return values
    return lax.bitcast_convert_type(to_bits(values, jnp.int32) << 16, jnp.float32)


def _add(
    sums,
    cotangent: jax.Array,
    argmax: jax.Array,
    rows: tuple[jax.Array, jax.Array],
    cols: tuple[jax.Array, jax.Array],
    strip: Strip,
    width: int,
    columns: int,
) -> None:
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
