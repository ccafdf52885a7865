"""Taps: which cells a bin's weighted mean is over along each axis, and what each of them weighs.

Every operator of the family says what its taps are. The sum over them, and its derivatives, know
nothing else (`_weighted_sum.py`). Most are made by one formula for both axes, along an axis of two:
first the rows, then the columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.export import is_symbolic_dim

from jax_roipool._backends.weighted_sum.cells import unpack
from jax_roipool._bins import Convention, packed_edges
from jax_roipool._float32 import float32_product, float32_quotient
from jax_roipool._manual_axes import vary_with

MAX_SAMPLES = 4096
"""Up to this many samples of a bin along an axis, every quotient is exact."""

CHUNK = 32
"""Adaptive weights are worked out for so many cells of a run at a time."""


class Taps(NamedTuple):
    """Operands of the weighted sum: see `jax_roipool._backends.weighted_sum`."""

    cells: jax.Array  # int32 [G, K, 3 + P*S + Q*U]: image index, taps that count, first cells
    rows: jax.Array  # float32 [G, K, P, T]
    columns: jax.Array  # float32 [G, K, Q, V]
    run: tuple[int, int]  # the cells of a run, T/S along the rows and V/U along the columns


class _Bins(NamedTuple):
    """Bins of equal length. There are as many along both axes as the axis that has more has."""

    start: jax.Array  # float32 [G, K, 2, bins]
    length: jax.Array  # float32 [G, K, 2, 1]


def _bins(
    cells: jax.Array, output_size: tuple[int, int], offset: float = 0.0, least: float = -np.inf
) -> _Bins:
    """The bins of RoIs that are moved back by `offset` cells and are `least` cells long."""
    start, end = cells[..., 1::-1] - offset, cells[..., :1:-1] - offset
    length = jnp.maximum(end - start, least)
    length = float32_quotient(length, np.array(output_size, np.float32))[..., None]
    bin = np.arange(max(output_size), dtype=np.float32)
    return _Bins(start[..., None] + float32_product(length, bin), length)


def align_taps(
    image_index: jax.Array,
    cells: jax.Array,
    output_size: tuple[int, int],
    map_size: tuple[int, int],
    sampling_ratio: tuple[int, int] | None,
    aligned: bool,
) -> Taps:
    """RoIAlign's: bilinear samples, where torchvision's float32 arithmetic places them.

    Args:
      image_index: int32 `[G, K]`.
      cells: float32 `[G, K, 4]`, `(x1, y1, x2, y2)` in cells, finite and within +-2**29.
      output_size: (P, Q).
      map_size: (H, W).
      sampling_ratio: samples a bin along rows and columns, or None: as many as a bin is cells long.
      aligned: whether a cell's centre is half a cell after its index.
    """
    bins = _bins(cells, output_size, *((0.5, -np.inf) if aligned else (0.0, 1.0)))
    sizes = _sizes(map_size).reshape(2, 1, 1)
    if sampling_ratio is None:
        runs = _adaptive_samples(bins, sizes, _longest(map_size))
        return _pack_runs(image_index, *runs, output_size, map_size)
    numbers = np.arange(max(sampling_ratio), dtype=np.float32)
    ratios = np.array(sampling_ratio, np.float32).reshape(2, 1, 1)
    first, weights = _samples(bins, numbers, ratios, sizes)
    weights *= 1 / ratios[..., None]
    return _pack(
        image_index,
        _of_each_axis(first, output_size, sampling_ratio),
        _of_each_axis(weights, output_size, sampling_ratio),
    )


def _samples(bins: _Bins, number, samples, sizes) -> tuple[jax.Array, jax.Array]:
    """The cell before each sample, and the weights of it and of the next.

    A sample more than a cell outside of the map has no weight, one at the border has the border's
    cell alone.

    Args:
      number: float32 `[..., samples]`, the samples' number in their bin.
      samples: float32, how many a bin has.
      sizes: `[2, 1, 1]`, H and W.

    Returns:
      int32 `[G, K, 2, bins, samples]`, float32 `[G, K, 2, bins, samples, 2]`.
    """
    start, length = bins.start[..., None], bins.length[..., None]
    position = start + float32_quotient(float32_product(length, number + 0.5), samples)
    inside = (position >= -1) & (position <= sizes)
    position = jnp.clip(position, 0, sizes - 1)
    cell = jnp.floor(position)
    part = position - cell
    weights = jnp.where(inside[..., None], jnp.stack([1 - part, part], axis=-1), 0)
    return cell.astype(jnp.int32), weights


def _adaptive_samples(bins: _Bins, sizes, longest: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As many samples as a bin is cells long, rounded up; what is returned, `_pack_runs` takes."""
    samples = jnp.ceil(bins.length)
    divisor = jnp.maximum(samples, 1)
    # Samples are half a cell apart or more: not more of them than this are near the map.
    apart = jnp.maximum(bins.length / divisor, 0.25)
    sizes_of_bins = sizes[..., 0]
    begin = jnp.clip(jnp.floor((-3 - bins.start) / apart), 0, divisor)
    end = jnp.clip(jnp.ceil((sizes_of_bins + 2 - bins.start) / apart), 0, samples)
    first, last = (
        jnp.clip(x, 0, sizes_of_bins - 1).astype(jnp.int32)
        for x in (bins.start, bins.start + bins.length + 1)
    )

    def zeros(cells):
        """For each bin, on the devices that have it."""
        start = jnp.zeros_like(bins.start)[..., None]
        return vary_with(jnp.broadcast_to(start, (*start.shape[:-1], cells)), bins.start)

    def weigh(chunk):
        """A chunk of cells of every run."""
        cell_of_run = chunk * CHUNK + lax.iota(jnp.int32, CHUNK)

        def add_sample(i, weights):
            number = begin + i.astype(jnp.float32)
            cell, pair = _samples(bins, number[..., None], divisor[..., None], sizes)
            pair = jnp.where((number < end)[..., None, None], pair, 0)
            at = cell - first[..., None]
            before = jnp.where(at == cell_of_run, pair[..., 0], 0)
            return weights + before + jnp.where(at + 1 == cell_of_run, pair[..., 1], 0)

        most = jnp.max(end - begin, initial=0).astype(jnp.int32)
        return lax.fori_loop(0, most, add_sample, zeros(CHUNK))

    def set_chunk(chunk, weights):
        return lax.dynamic_update_slice_in_dim(weights, weigh(chunk), chunk * CHUNK, axis=-1)

    # Few maps have bins as long as they are: cells that no run reaches are left at 0.
    chunks = jnp.max(last - first, initial=0) // CHUNK + 1
    weights = lax.fori_loop(0, chunks, set_chunk, zeros(longest + CHUNK - 1))
    return first, last, weights[..., :longest] / divisor[..., None]


def average_taps(
    image_index: jax.Array,
    cells: jax.Array,
    output_size: tuple[int, int],
    map_size: tuple[int, int],
    convention: Convention,
    unread: int = 0,
) -> Taps:
    """A mean of whole cells: those of `jax_roipool.roi_pool`'s bins. An empty one has none.

    The last `unread` rows and columns of the map are in no bin.
    """
    P, Q = output_size
    read = map_size[0] - unread, map_size[1] - unread
    edges = packed_edges(image_index, cells, output_size, read, convention)
    _, *bounds = jnp.split(edges, np.cumsum((1, P, P, Q)), axis=-1)
    first, weights, longest = [], [], []
    for begin, end, size in zip(bounds[::2], bounds[1::2], map_size, strict=True):
        count = jnp.maximum(end - begin, 0)
        weight = 1 / jnp.maximum(count, 1).astype(jnp.float32)
        is_in_bin = lax.iota(jnp.int32, size) < count[..., None]
        first.append(jnp.minimum(begin, size - 1)[..., None])
        weights.append(jnp.where(is_in_bin, weight[..., None], 0)[..., None, :])
        longest.append(count.max(axis=-1))
    return _pack(image_index, first, weights, jnp.stack(longest, axis=-1))


def pr_taps(
    image_index: jax.Array,
    cells: jax.Array,
    output_size: tuple[int, int],
    map_size: tuple[int, int],
) -> Taps:
    """Precise RoI pooling's: the mean over a bin of each cell's hat function."""
    bins = _bins(cells, output_size, least=0.0)
    sizes = _sizes(map_size).reshape(2, 1)
    start, end = bins.start, bins.start + bins.length
    first, last = (
        jnp.clip(lax.stop_gradient(x), 0, sizes - 1).astype(jnp.int32) for x in (start, end + 1)
    )
    cell = (first[..., None] + lax.iota(jnp.int32, _longest(map_size))).astype(jnp.float32)
    start, end, length = start[..., None] - cell, end[..., None] - cell, bins.length[..., None]
    # A hat is a line on each side of its cell, and the mean of a line is its value in the middle.
    weights = 0.0
    for slope, side in ((1, (-1, 0)), (-1, (0, 1))):
        begin, stop = jnp.clip(start, *side), jnp.clip(end, *side)
        weights += (stop - begin) * (1 + slope * (begin + stop) / 2)
    is_touched = (start < 1) & (end > -1) & (length > 0) & (cell < sizes[..., None])
    # Chosen last, as the derivative by a weight that has none may be that of a cell not to be read.
    weights = jnp.where(is_touched, weights / jnp.where(length > 0, length, 1), 0)
    return _pack_runs(image_index, first, last, weights, output_size, map_size)


def crop_taps(
    image_index: jax.Array,
    boxes: jax.Array,
    output_size: tuple[int, int],
    map_size: tuple[int, int],
) -> tuple[Taps, jax.Array]:
    """A crop's: a bilinear sample a bin, where TensorFlow's float32 arithmetic places it.

    Args:
      image_index: int32 `[G, K]`.
      boxes: float32 `[G, K, 4]`, `(x1, y1, x2, y2)`: 0 is the first cell, 1 the last.
      output_size: (P, Q).
      map_size: (H, W).

    Returns:
      The taps, and whether the sample of a bin is on the map, bool `[G, K, P, Q]`.
    """
    start, end = boxes[..., 1::-1], boxes[..., :1:-1]
    last = _sizes(map_size).astype(np.float32) - 1
    steps = np.array(output_size, np.float32) - 1
    length = float32_quotient(float32_product(end - start, last), np.maximum(steps, 1))
    begin = float32_product(jnp.where(steps > 0, start, (start + end) / 2), last)
    bin = np.arange(max(output_size), dtype=np.float32)
    position = begin[..., None] + float32_product(length[..., None], bin)
    inside = (position >= 0) & (position <= last[:, None])
    inside &= (image_index >= 0)[..., None, None]
    position = jnp.where(inside, position, 0)
    before, after = jnp.floor(position), jnp.ceil(position)
    part = position - before
    weights = jnp.where(inside[..., None], jnp.stack([1 - part, part], axis=-1), 0)
    first = jnp.stack([before, after], axis=-1).astype(jnp.int32)
    taps = _pack(
        image_index,
        _of_each_axis(first, output_size),
        _of_each_axis(weights[..., None], output_size),
    )
    rows, columns = _of_each_axis(inside, output_size)
    return taps, rows[..., :, None] & columns[..., None, :]


def split_bins(taps: Taps) -> Taps:
    """Each bin's taps as those of a group that has this bin alone, `[G*P*Q, ...]`."""
    (G, _, P, _), Q = taps.rows.shape, taps.columns.shape[2]
    cells = unpack(taps.cells, taps.rows.shape, taps.columns.shape, taps.run)

    def of_rois(x):
        """`[G, K, ...]` to `[G*P*Q, K, ...]`."""
        x = jnp.broadcast_to(x[:, None, None], (G, P, Q, *x.shape[1:]))
        return x.reshape(G * P * Q, *x.shape[3:])

    def of_bins(x, axis):
        """`[G, K, bins, ...]` to `[G*P*Q, K, 1, ...]`."""
        x = jnp.expand_dims(jnp.moveaxis(x, 2, 1), (2 - axis, 4))
        x = jnp.broadcast_to(x, (G, P, Q, *x.shape[3:]))
        return x.reshape(G * P * Q, *x.shape[3:])

    weights = [
        of_bins(x.reshape(*x.shape[:3], x.shape[3] // run, run), axis)
        for axis, (x, run) in enumerate(zip((taps.rows, taps.columns), taps.run, strict=True))
    ]
    first = [of_bins(cells.rows, 0), of_bins(cells.columns, 1)]
    return _pack(of_rois(cells.image_index), first, weights, of_rois(cells.counts))


def _sizes(map_size: tuple[int, int]):
    """H and W as an array, a constant unless they are symbolic."""
    if any(map(is_symbolic_dim, map_size)):
        return jnp.stack([jnp.asarray(size, jnp.int32) for size in map_size])
    return np.array(map_size, np.int32)


def _longest(map_size: tuple[int, int]) -> int:
    """So many cells that no run has more; symbols cannot be compared."""
    return sum(map_size) if any(map(is_symbolic_dim, map_size)) else max(map_size)


def _of_each_axis(
    x: jax.Array, output_size: tuple[int, int], runs: tuple[int, int] | None = None
) -> list[jax.Array]:
    """Of `[G, K, 2, bins, ...]` what the rows and the columns have; `runs` are the axis' after."""
    parts = [x[:, :, axis, :bins] for axis, bins in enumerate(output_size)]
    if runs is None:
        return parts
    return [x[:, :, :, :of_bin] for x, of_bin in zip(parts, runs, strict=True)]


def _pack_runs(image_index, first, last, weights, output_size, map_size) -> Taps:
    """Taps of bins that are one run of cells each.

    Args:
      image_index: int32 `[G, K]`.
      first: int32 `[G, K, 2, bins]`, the first cell of a bin.
      last: likewise; no cell after it has a weight.
      weights: float32 `[G, K, 2, bins, cells]`, of the cells from the first on.
      output_size: (P, Q).
      map_size: (H, W), than which no run is longer.
    """
    longest = [x.max(axis=-1) + 1 for x in _of_each_axis(last - first, output_size)]
    first = _of_each_axis(first[..., None], output_size)
    weights = [
        x[..., None, :size]
        for x, size in zip(_of_each_axis(weights, output_size), map_size, strict=True)
    ]
    return _pack(image_index, first, weights, jnp.stack(longest, axis=-1))


def _pack(
    image_index: jax.Array,
    first: Sequence[jax.Array],
    weights: Sequence[jax.Array],
    counts: jax.Array | None = None,
) -> Taps:
    """Taps of rows and columns.

    Args:
      image_index: int32 `[G, K]`.
      first: int32 `[G, K, bins, runs]` of either, the first cell of each run.
      weights: float32 `[G, K, bins, runs, cells of a run]` of either.
      counts: int32 `[G, K, 2]`, after how many taps of either none has a weight; None: after all.
    """
    rows, columns = (x.reshape(*x.shape[:3], x.shape[3] * x.shape[4]) for x in weights)
    if counts is None:
        counts = 0 * image_index[..., None] + np.array([rows.shape[3], columns.shape[3]], np.int32)
    starts = (x.reshape(*image_index.shape, x.shape[2] * x.shape[3]) for x in first)
    cells = jnp.concatenate([image_index[..., None], counts, *starts], axis=-1)
    return Taps(cells, rows, columns, (weights[0].shape[4], weights[1].shape[4]))
