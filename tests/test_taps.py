"""Sampling points to the last bit: the cells and weights of taps, against the definition."""

import functools

import jax
import numpy as np
import pytest

import average_oracle as oracle
from harness import some_by_default
from jax_roipool._rois import canonical_rois
from jax_roipool._taps import align_taps

MAP = (20, 33)
BINS = (7, 3)
SCALE = np.float32(0.7)


def hostile_rois(count, seed=0):
    """RoIs in and out of the map, inverted, without area, and with samples at its borders."""
    rng = np.random.default_rng(seed)
    start = rng.uniform(-8, 40, (count, 2))
    rois = np.concatenate([start, start + rng.normal(size=(count, 2)) * 20], axis=1)
    kind = rng.integers(0, 6, count)
    rois[kind == 0] = np.round(rois[kind == 0])  # whole cells, and halves, with a scale of 1
    rois[kind == 1] = np.round(rois[kind == 1] * 2) / 2
    rois[kind == 2, 2:] = rois[kind == 2, :2]
    rois[kind == 3] *= 10.0 ** rng.integers(-3, 4, (kind == 3).sum())[:, None]
    return rois.astype(np.float32)


ROIS = np.concatenate([hostile_rois(1500), np.float32([[-1e9, -1e9, 1e9, 1e9], [0, 0, 1e9, 1e9]])])


@functools.cache
def taps_function(sampling_ratio, aligned):
    @jax.jit
    def taps(rois, spatial_scale):
        index, cells = canonical_rois(rois, None, None, spatial_scale, images=1)
        return align_taps(index, cells, BINS, MAP, sampling_ratio, aligned)[:3]

    return taps


def in_cells(rois, spatial_scale):
    return np.clip(rois * np.float32(spatial_scale), -(2.0**29), 2.0**29)


@pytest.mark.parametrize("spatial_scale", some_by_default((1, SCALE), (SCALE,)))
@pytest.mark.parametrize("aligned", (True, False))
@pytest.mark.parametrize("sampling_ratio", ((1, 2), (3, 1)))
def test_samples_of_a_fixed_ratio(sampling_ratio, aligned, spatial_scale):
    taps = taps_function(sampling_ratio, aligned)(ROIS, np.float32(spatial_scale))
    cells, rows, columns = (np.asarray(x)[0] for x in taps)
    assert not cells[:, 0].any()
    (P, Q), (n, m) = BINS, sampling_ratio
    assert (cells[:, 1:3] == (2 * n, 2 * m)).all()
    first = cells[:, 3 : 3 + P * n].reshape(-1, P, n), cells[:, 3 + P * n :].reshape(-1, Q, m)
    weights = rows.reshape(-1, P, n, 2), columns.reshape(-1, Q, m, 2)
    corners = in_cells(ROIS, spatial_scale)
    for axis, (start, stop) in enumerate(((1, 3), (0, 2))):
        ratio = sampling_ratio[axis]
        for k, corner in enumerate(corners):
            pair = corner[start], corner[stop]
            wanted = oracle.samples(*pair, BINS[axis], MAP[axis], ratio, aligned)
            weight = np.stack([wanted.weight_of_low, wanted.weight_of_high], axis=-1)
            np.testing.assert_array_equal(weights[axis][k], weight * np.float32(1 / ratio))
            np.testing.assert_array_equal(
                np.where(wanted.inside, first[axis][k], 0), np.where(wanted.inside, wanted.low, 0)
            )


def dense(cells, weights, size):
    """Weights of cells `[bins, size]`, of runs of one bin each."""
    result = np.zeros((len(weights), size))
    for bin_, (first, run) in enumerate(zip(cells, weights, strict=True)):
        assert 0 <= first < size
        np.add.at(result[bin_], np.minimum(first + np.arange(len(run)), size - 1), run)
    return result


@pytest.mark.parametrize("aligned", (True, False))
def test_samples_of_an_adaptive_ratio(aligned):
    rois = ROIS[:600]
    cells, rows, columns = (
        np.asarray(x)[0] for x in taps_function(None, aligned)(ROIS, np.float32(SCALE))
    )
    weights = oracle.roi_align_weights((*MAP, 1), rois, BINS, SCALE, None, aligned)
    for k in range(len(rois)):
        assert not rows[k, :, max(cells[k, 1], 0) :].any()
        assert not columns[k, :, max(cells[k, 2], 0) :].any()
        found = dense(cells[k, 3 : 3 + BINS[0]], rows[k], MAP[0])
        np.testing.assert_allclose(found, weights.rows[k], atol=5e-7)
        found = dense(cells[k, 3 + BINS[0] :], columns[k], MAP[1])
        np.testing.assert_allclose(found, weights.columns[k], atol=5e-7)


def test_the_largest_rois_take_finitely_many_steps():
    cells, rows, columns = taps_function(None, True)(ROIS, np.float32(SCALE))
    assert np.isfinite(rows).all()
    assert np.isfinite(columns).all()
    assert (cells[..., 3:] >= 0).all()
