"""Taps: which cells a bin's weighted mean is over along each axis, and what each of them weighs.

Every operator of the family says what its taps are. The sum over them, and its derivatives, know
nothing else (`_weighted_sum.py`). Both axes are made by one formula, along an axis of two: first
the rows, then the columns.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_roipool._float32 import float32_product, float32_quotient
from jax_roipool._manual_axes import vary_with

MAX_SAMPLES = 4096
"""Up to this many samples of a bin along an axis, every quotient is exact."""


class Taps(NamedTuple):
    """Operands of the weighted sum: see `jax_roipool._backends.weighted_sum`."""

    cells: jax.Array  # int32 [G, K, 1 + P*S + Q*U]: the image index, and where runs of cells begin
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
    sizes = np.array(map_size, np.int32).reshape(2, 1, 1)
    if sampling_ratio is None:
        first, weights = _adaptive_samples(bins, sizes)
    else:
        numbers = np.arange(max(sampling_ratio), dtype=np.float32)
        ratios = np.array(sampling_ratio, np.float32).reshape(2, 1, 1)
        first, weights = _samples(bins, numbers, ratios, sizes)
        weights *= 1 / ratios[..., None]
    return _packed(image_index, first, weights, output_size, sampling_ratio or (1, 1), map_size)


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


def _adaptive_samples(bins: _Bins, sizes: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """A run of all cells that a bin's samples touch, and the weights of these.

    Returns:
      int32 `[G, K, 2, bins, 1]`, float32 `[G, K, 2, bins, 1, cells]`.
    """
    samples = jnp.ceil(bins.length)
    divisor = jnp.maximum(samples, 1)
    # Samples are half a cell apart or more: not more of them than this are near the map.
    apart = jnp.maximum(bins.length / divisor, 0.25)
    sizes_of_bins = sizes[..., 0]
    begin = jnp.clip(jnp.floor((-3 - bins.start) / apart), 0, divisor)
    end = jnp.clip(jnp.ceil((sizes_of_bins + 2 - bins.start) / apart), 0, samples)
    first = jnp.clip(jnp.floor(bins.start), 0, sizes_of_bins - 1).astype(jnp.int32)[..., None]
    cell_of_run = lax.iota(jnp.int32, sizes.max())

    def add_sample(i, weights):
        number = begin + i.astype(jnp.float32)
        cell, pair = _samples(bins, number[..., None], divisor[..., None], sizes)
        pair = jnp.where((number < end)[..., None, None], pair, 0)
        at = cell - first
        before = jnp.where(at == cell_of_run, pair[..., 0], 0)
        return weights + before + jnp.where(at + 1 == cell_of_run, pair[..., 1], 0)

    most = jnp.max(end - begin, initial=0).astype(jnp.int32)
    weights = jnp.zeros((*bins.start.shape, sizes.max()), jnp.float32)
    weights = lax.fori_loop(0, most, add_sample, vary_with(weights, bins.start))
    return first, (weights / divisor[..., None])[..., None, :]


def _packed(image_index, first, weights, output_size, runs, map_size) -> Taps:
    """Taps of both axes in one.

    Args:
      first: int32 `[G, K, 2, bins, runs]`, the first cell of each run.
      weights: float32 `[G, K, 2, bins, runs, cells of a run]`.
      output_size: (P, Q).
      runs: how many a bin has along rows and columns.
      map_size: (H, W), longer than which no run has to be.
    """
    lead = image_index.shape
    cells, axes = [image_index[..., None]], []
    for axis, (bins, runs_of_bin, size) in enumerate(zip(output_size, runs, map_size, strict=True)):
        cells.append(first[:, :, axis, :bins, :runs_of_bin].reshape(*lead, bins * runs_of_bin))
        axes.append(weights[:, :, axis, :bins, :runs_of_bin, :size])
    run = axes[0].shape[-1], axes[1].shape[-1]
    rows, columns = (x.reshape(*x.shape[:3], x.shape[3] * x.shape[4]) for x in axes)
    return Taps(jnp.concatenate(cells, axis=-1), rows, columns, run)
