"""The table backend's own seams: what does not fit a table, and bins that it has no rows for."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_roipool
import oracle
from harness import (
    EVERY_CONVENTION,
    assert_same,
    convention_id,
    distinct_features,
    random_rois,
    resolved,
)
from jax_roipool._backends import table

GROUPS, HEIGHT, WIDTH, CHANNELS, OUTPUT_SIZE = 3, 40, 19, 5, (4, 3)
FEATURES = distinct_features((GROUPS, HEIGHT, WIDTH, CHANNELS))
ROIS = jnp.stack([random_rois(6, HEIGHT, WIDTH, seed) for seed in range(GROUPS)])
# Bins of 10 + 1 rows and 7 + 1 columns at most: windows of 1 to 8 rows and 1 to 4 columns.
WINDOWS = 4 * 3 * HEIGHT * WIDTH
BYTES_PER_CHANNEL = 6 * WINDOWS  # a float32 and an int16
SIXTEEN_MAPS = jnp.asarray([[-4 * WIDTH, -4 * HEIGHT, 12 * WIDTH, 12 * HEIGHT]], jnp.float32)


def pool_and_gradient(rois=ROIS, roi_mask=None):
    jax.clear_caches()

    def pool(features):
        return jax_roipool.roi_pool(
            features,
            rois,
            OUTPUT_SIZE,
            roi_mask=roi_mask,
            convention="torchvision",
            implementation="table",
        )

    pooled, pullback = jax.vjp(pool, FEATURES)
    return pooled, pullback(cotangent(pooled.shape))[0]


def cotangent(shape):
    return jnp.arange(1, 1 + np.prod(shape), dtype=jnp.float32).reshape(shape)


def expected(rois=ROIS, roi_mask=None):
    pooled, argmax = oracle.roi_pool(
        FEATURES, rois, OUTPUT_SIZE, resolved("torchvision"), 1.0, roi_mask
    )
    gradient = oracle.roi_pool_grad(cotangent(pooled.shape), argmax, FEATURES.shape, rois)
    return pooled, gradient.astype(np.float32)


@pytest.fixture
def no_fallback(monkeypatch):
    """Whatever `xla` pools is 77."""

    def wrong(features, *rectangles, argmax_dtype, empty_value):
        _, row_start, _, col_start, _ = rectangles
        shape = (*row_start.shape, col_start.shape[2], features.shape[-1])
        pooled = jnp.full(shape, 77, features.dtype)
        return [pooled, jnp.zeros(shape, argmax_dtype)] if argmax_dtype else [pooled]

    monkeypatch.setattr(table.xla, "rectangle_max", wrong)


@pytest.fixture
def tables(monkeypatch):
    """What tables were made of: images and channels, of each that was traced."""
    traced = []

    def make(cells, levels):
        traced.append((cells[0].shape[0], cells[0].shape[-1]))
        return _table(cells, levels)

    _table = table._table
    monkeypatch.setattr(table, "_table", make)
    return traced


@pytest.mark.parametrize(
    ("channels", "channels_that_fit", "images_and_channels"),
    (
        pytest.param(1, GROUPS * CHANNELS, (GROUPS, CHANNELS), id="all"),
        pytest.param(1, GROUPS * CHANNELS - 1, (1, CHANNELS), id="a group"),
        pytest.param(1, 3, (1, 3), id="3 channels, then 3 of which one again"),
        pytest.param(1, 1, (1, 1), id="a channel"),
        pytest.param(1, 0.5, (1, 1), id="a channel, though it does not fit"),
        pytest.param(2, 0.5, (1, 2), id="2 channels, though they do not fit"),
    ),
)
def test_what_does_not_fit_one_table_is_taken_in_turn(
    channels, channels_that_fit, images_and_channels, tables, no_fallback, monkeypatch
):
    monkeypatch.setattr(table, "CHANNELS", channels)
    monkeypatch.setattr(table, "TABLE_BYTES", int(channels_that_fit * BYTES_PER_CHANNEL))
    for actual, wanted in zip(pool_and_gradient(), expected(), strict=True):
        assert_same(actual, wanted)
    assert set(tables) == {images_and_channels}


def test_groups_that_an_index_cannot_reach_together_are_taken_in_turn(tables, monkeypatch):
    monkeypatch.setattr(table, "INDEX_LIMIT", 2 * WINDOWS)
    for actual, wanted in zip(pool_and_gradient(), expected(), strict=True):
        assert_same(actual, wanted)
    assert set(tables) == {(1, CHANNELS)}


def test_a_table_that_an_index_cannot_reach_is_not_made(tables, monkeypatch):
    monkeypatch.setattr(table, "INDEX_LIMIT", WINDOWS)
    for actual, wanted in zip(pool_and_gradient(), expected(), strict=True):
        assert_same(actual, wanted)
    assert not tables


def large_bins():
    return ROIS.at[:, 2].set(SIXTEEN_MAPS[0])


def test_larger_bins_than_the_table_has():
    for actual, wanted in zip(pool_and_gradient(large_bins()), expected(large_bins()), strict=True):
        assert_same(actual, wanted)


def test_larger_bins_are_left_to_the_fallback(no_fallback):
    pooled, _ = pool_and_gradient(large_bins())
    assert (pooled == 77).all()


def test_padding_with_large_bins_needs_no_fallback(no_fallback):
    mask = jnp.ones(ROIS.shape[:2], bool).at[:, 2].set(False)
    got = pool_and_gradient(large_bins(), mask)
    for actual, wanted in zip(got, expected(large_bins(), mask), strict=True):
        assert_same(actual, wanted)


@pytest.mark.parametrize("convention", EVERY_CONVENTION, ids=convention_id)
def test_two_windows_cover_every_bin_of_a_roi_inside_the_map(convention):
    for bins, size in itertools.product((1, 2, 3, 7, 14), range(1, 400)):
        last = size - 1 if convention.inclusive_end else size
        edges = oracle.bin_edges(0, last, bins, size, convention)
        longest = max(end - start for start, end in edges)
        levels = table._levels(size, bins)
        assert 2**levels >= longest
        assert 2 ** (levels - 2) < longest  # a level less would do, at most
