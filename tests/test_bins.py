"""Where the bins are: every edge of every bin, against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_roipool
import oracle
from harness import EVERY_CONVENTION, PRESETS, assert_same, convention_id, pool, resolved
from jax_roipool._bins import packed_edges
from jax_roipool._rois import canonical_rois

LENGTHS = np.arange(1, 2049)
OFFSET = 3
WIDTH = 2064


def ramp(width):
    """Channel 0 rises by one a cell, so its maximum is the last cell; channel 1 falls."""
    cells = np.arange(width, dtype=np.float32)
    return jnp.asarray(np.stack([cells, -cells], axis=-1)[None])


@functools.cache
def edges_function(output_size, map_size, convention):
    @jax.jit
    def edges(rois, spatial_scale):
        cells = canonical_rois(rois, None, None, spatial_scale, images=1)
        return packed_edges(*cells, output_size, map_size, resolved(convention))

    return edges


def observed_edges(bounds, bins, width, convention, spatial_scale=1.0):
    """The half-open ranges `[R, bins, 2]` of RoIs with the given `[R, 2]` ends, along both axes.

    Along the rows there are as many bins, or one more on a longer map, which divides by another
    number; the edges of the former are returned.
    """
    rois = np.asarray(np.repeat(np.asarray(bounds, np.float32), 2, axis=1)[None])
    alike, more = (
        np.asarray(edges_function(*sizes, convention)(rois, np.float32(spatial_scale)))[0]
        for sizes in (((bins, bins), (width, width)), ((bins + 1, bins), (2 * width, width)))
    )
    np.testing.assert_array_equal(alike[:, 1 : 1 + 2 * bins], alike[:, 1 + 2 * bins :])
    np.testing.assert_array_equal(alike[:, 1 + 2 * bins :], more[:, 3 + 2 * bins :])
    assert not alike[:, 0].any()
    edges = np.stack([alike[:, 1 : 1 + bins], alike[:, 1 + bins : 1 + 2 * bins]], axis=-1)
    edges[edges[..., 1] <= edges[..., 0]] = 0
    return edges


def expected_edges(cells, bins, width, convention):
    """The same from the definition; `cells` holds whole numbers."""
    edges = [oracle.bin_edges(a, b, bins, width, resolved(convention)) for a, b in cells]
    edges = np.array(edges).reshape(len(cells), bins, 2)
    edges[edges[..., 1] <= edges[..., 0]] = 0
    return edges


def test_presets_are_the_documented_table():
    def convention(*fields):
        names = ("inclusive_end", "overlapping_bins", "float32_edges", "empty_value")
        return jax_roipool.Convention(**dict(zip(names, fields, strict=True)))

    assert dict(jax_roipool.CONVENTIONS) == {
        "partition": convention(False, False, False, 0.0),
        "torchvision": convention(True, True, True, 0.0),
        "openvino": convention(True, True, False, 0.0),
        "chainer": convention(False, True, False, -np.inf),
    }
    assert jax_roipool.Convention() == jax_roipool.CONVENTIONS["partition"]


@pytest.mark.parametrize("bins", (3, 14))
@pytest.mark.parametrize("convention", EVERY_CONVENTION, ids=convention_id)
def test_edges_of_any_convention(convention, bins):
    rng = np.random.default_rng(0)
    starts = rng.integers(-40, 70, 200)
    cells = np.stack([starts, starts + rng.integers(-9, 90, 200)], axis=1)
    cells[:8] = [(0, 0), (0, 1), (0, 63), (0, 64), (-1, 64), (63, 64), (64, 65), (-9, 0)]
    observed = observed_edges(cells, bins, 64, convention)
    np.testing.assert_array_equal(observed, expected_edges(cells, bins, 64, convention))


@pytest.mark.parametrize(
    ("convention", "bins"), (*((name, 7) for name in PRESETS), ("torchvision", 14))
)
def test_edges_of_every_length(convention, bins):
    inclusive = resolved(convention).inclusive_end
    cells = [(OFFSET, OFFSET + int(length) - inclusive) for length in LENGTHS]
    observed = observed_edges(cells, bins, WIDTH, convention)
    expected = expected_edges(cells, bins, WIDTH, convention)
    np.testing.assert_array_equal(observed, expected)


@pytest.mark.parametrize(("bins", "differing", "early"), ((7, 70, 0), (14, 106, 36)))
def test_torchvision_float32_spill(bins, differing, early):
    # Counts measured on the released operators: lengths with any edge that is not the exact one,
    # and of these the ones with a start one cell early. Division by a constant, which XLA
    # replaces with a multiplication, would give others.
    cells = [(0, int(length) - 1) for length in LENGTHS]
    starts, ends = np.moveaxis(observed_edges(cells, bins, WIDTH, "torchvision"), -1, 0)
    i = np.arange(bins)
    exact_starts = i * LENGTHS[:, None] // bins
    exact_ends = -(-(i + 1) * LENGTHS[:, None] // bins)
    assert set(np.unique(ends - exact_ends)) == {0, 1}
    assert set(np.unique(starts - exact_starts)) <= {0, -1}
    different = np.any((ends != exact_ends) | (starts != exact_starts), axis=1)
    assert np.sum(different) == differing
    assert np.sum(np.any(starts != exact_starts, axis=1)) == early
    assert LENGTHS[different][:2].tolist() == {7: [57, 114], 14: [57, 62]}[bins]


def test_spilled_cell_is_pooled_by_torchvision_alone():
    features = np.zeros((1, 64, 1), np.float32)
    features[0, 57] = 5
    rois = jnp.asarray([[0.0, 0.0, 56.0, 0.0]])
    for convention, last in (("torchvision", 5), ("openvino", 0)):
        pooled, _ = pool((1, 7), convention)(features, rois)
        assert_same(pooled[0, 0, :, 0], np.float32([0] * 6 + [last]))


@pytest.mark.parametrize("bins", (1, 3, 8))
def test_partition_covers_the_roi_once_and_leaves_no_bin_empty(bins):
    cells = [(OFFSET, OFFSET + length) for length in range(1, 65)]
    starts, ends = np.moveaxis(observed_edges(cells, bins, 80, "partition"), -1, 0)
    assert np.all(ends > starts)
    for (start, stop), low, high in zip(cells, starts, ends, strict=True):
        assert low[0] == start
        assert high[-1] == stop
        if stop - start >= bins:
            np.testing.assert_array_equal(low[1:], high[:-1])


@pytest.mark.parametrize("convention", PRESETS)
def test_short_inverted_and_clipped_rois(convention):
    cells = [(5, 5 + length) for length in range(-12, 9)]
    # The bins keep their places when part of the RoI lies outside the map: clipping comes last.
    cells += [(start, stop) for start in (-25, -6, 0, 11) for stop in (-3, 5, 12, 13, 41)]
    observed = observed_edges(cells, 6, 12, convention)
    np.testing.assert_array_equal(observed, expected_edges(cells, 6, 12, convention))


@pytest.mark.parametrize(
    ("coordinate", "cell"),
    (
        (0.0, 0),
        (1e-45, 0),
        (0.25, 0),
        (0.49999997, 0),  # A half added in float32 gives 1.
        (0.5, 1),
        (1.5, 2),
        (2.5, 3),  # Half to even gives 2.
        (4.5, 5),
        (4.4999995, 4),
        (4.5000005, 5),
    ),
)
def test_coordinates_round_half_away_from_zero(coordinate, cell):
    edges = observed_edges([(coordinate, 9)], 1, 16, "partition")
    assert edges.tolist() == [[[cell, 9]]]
    edges = observed_edges([(0, coordinate)], 1, 16, "torchvision")
    assert edges.tolist() == [[[0, cell + 1]]]


@pytest.mark.parametrize(
    ("coordinate", "cell"), ((-0.49999997, 0), (-0.5, -1), (-1.5, -2), (-2.5, -3), (-2.25, -2))
)
def test_negative_coordinates_round_half_away_from_zero(coordinate, cell):
    # The start lies outside the map, but the other bins' edges depend on it.
    edges = observed_edges([(coordinate, 4)], 6, 16, "partition")
    expected = expected_edges([(cell, 4)], 6, 16, "partition")
    np.testing.assert_array_equal(edges, expected)


def test_scaled_coordinate_is_rounded_in_float32_first():
    # 5 * float32(0.7) is 3.49999994, which the float32 product rounds to 3.5.
    edges = observed_edges([(5, 20)], 1, 16, "partition", spatial_scale=0.7)
    assert edges.tolist() == [[[4, 14]]]


def test_spatial_scale_is_rounded_to_float32_first(x64):
    # In float64 the product stays under 2.5.
    scale = jnp.asarray(0.5 - 1e-12, jnp.float64)
    edges = observed_edges([(5, 20)], 1, 32, "partition", spatial_scale=scale)
    assert edges.tolist() == [[[3, 10]]]


@pytest.mark.parametrize("convention", PRESETS)
def test_huge_rois_do_not_overflow(convention):
    # The last bin's start, 6 * L // 7, falls inside the map although 6 * L is past int32.
    start = -6 * 2**26
    cells = [(start, 2**26 + 32 * k) for k in range(4)]
    # Beyond the range, coordinates are kept at 2**29.
    limit = oracle.COORDINATE_LIMIT
    bounds = [*cells, (-3e38, 3e38), (-1e10, 64), (32, 1e10), (-(2.0**31), 2.0**31)]
    cells += [(-limit, limit), (-limit, 64), (32, limit), (-limit, limit)]
    observed = observed_edges(bounds, 7, 128, convention)
    np.testing.assert_array_equal(observed, expected_edges(cells, 7, 128, convention))
    assert np.all(observed[..., 1].max(axis=1) > 0)


def test_overflowing_product_is_kept_in_range():
    # The coordinate and the scale are finite, so the RoI is good although the product is not.
    edges = observed_edges([(-3e38, 3e38)], 1, 16, "partition", spatial_scale=8.0)
    assert edges.tolist() == [[[0, 16]]]


@pytest.mark.parametrize("x2", (2**40, -(2**40)))
def test_64_bit_integers_are_kept_in_range_with_64_bit_types_off(x2):
    ramp = np.arange(8, dtype=np.float32).reshape(1, 8, 1)
    rois = np.array([[3, 0, x2, 1]])
    pooled, _ = pool((1, 2))(ramp, rois.astype(np.float32))
    eager = jax_roipool.roi_pool(ramp, rois, (1, 2))
    assert_same(eager, np.asarray(pooled))
    assert pooled.max() == (7 if x2 > 0 else 3)


@pytest.mark.parametrize("dtype", (jnp.int32, jnp.uint8, jnp.int8, jnp.float16, jnp.bfloat16))
def test_scale_applies_in_float32_whatever_the_rois_are(dtype):
    rois = jnp.asarray([[7, 0, 101, 0]], dtype)
    _, argmax = pool((1, 1), "partition")(ramp(128), rois, 0.7)
    # 7 * 0.7 = 4.9 -> 5 and 101 * 0.7 = 70.7 -> 71.
    assert argmax[0, 0, 0].tolist() == [70, 5]


def test_rows_and_columns_are_binned_alike():
    features = np.arange(30 * 40, dtype=np.float32).reshape(30, 40, 1)
    rois = jnp.asarray([[3.0, 5.0, 31.0, 26.0], [-4.0, 8.0, 20.0, 40.0]])
    _, argmax = pool((3, 4), "torchvision")(features, rois)
    swapped_rois = rois[:, jnp.asarray([1, 0, 3, 2])]
    swapped = jnp.asarray(features).transpose(1, 0, 2)
    _, swapped_argmax = pool((4, 3), "torchvision")(swapped, swapped_rois)
    row, column = np.divmod(np.asarray(argmax), 40)
    swapped_row, swapped_column = np.divmod(np.asarray(swapped_argmax), 30)
    assert np.all(argmax[0] >= 0)
    filled = np.asarray(argmax) >= 0
    np.testing.assert_array_equal(row[filled], swapped_column.transpose(0, 2, 1, 3)[filled])
    np.testing.assert_array_equal(column[filled], swapped_row.transpose(0, 2, 1, 3)[filled])
