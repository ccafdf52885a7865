"""The oracle of the averages is right: it gives other systems' recorded answers.

`fixtures/align/` has torchvision 0.29.1, ONNX Runtime 1.32.0, OpenVINO 2026.4.1, TensorFlow 2.21.0
and Chainer 7.8.1, with RoIs across the border, outside, empty, inverted and huge, and features up
to 8 in magnitude. Gradients are recorded where a system has them.
"""

import pathlib

import numpy as np
import pytest

import average_oracle
from harness import resolved

FOLDER = pathlib.Path(__file__).parent / "fixtures" / "align"
RECORDINGS = sorted(path.name for path in FOLDER.glob("*.npz"))
# Of features up to 8: a few float32 roundings. OpenVINO and Chainer round coordinates otherwise.
TOLERANCES = {"openvino": 1e-5, "chainer-roi_average_align": 4e-5}


def tolerance_of(name):
    return next((value for key, value in TOLERANCES.items() if name.startswith(key)), 4e-6)


def load(name):
    """A recording: its arrays, and its numbers and words as Python's."""
    with np.load(FOLDER / name) as recorded:
        found = {key: array if array.ndim else array.item() for key, array in recorded.items()}
    found["output_size"] = tuple(found["output_size"].tolist())
    if "sampling_ratio" in found and found["sampling_ratio"] < 0:
        found["sampling_ratio"] = None
    return found


def named(*words):
    return [name for name in RECORDINGS if all(word in name for word in words)]


def weights_of(recorded, **options):
    """The weights that the recorded operator is to have."""
    features_shape, rois = recorded["x"].shape, recorded.get("rois")
    sampling_ratio = recorded.get("sampling_ratio")
    match recorded["op"]:
        case "crop_and_resize":
            return average_oracle.crop_and_resize_weights(
                features_shape, recorded["boxes"], recorded["box_indices"], recorded["output_size"]
            )[0]
        case "roi_average_pooling_2d":
            convention = resolved("chainer")
            make, options = average_oracle.roi_average_pool_weights, {"convention": convention}
        case "ps_roi_pool":
            make = average_oracle.ps_roi_pool_weights
        case "ps_roi_align":
            make, options = average_oracle.ps_roi_align_weights, {"sampling_ratio": sampling_ratio}
        case "roi_align" | "RoiAlign" | "ROIAlign-9" | "roi_average_align_2d":
            make = average_oracle.roi_align_weights
            options = {"sampling_ratio": sampling_ratio, "aligned": recorded["aligned"]}
            if recorded.get("coordinate_mode") == "half_pixel" and recorded["op"] == "ROIAlign-9":
                rois = rois + np.float32([0, 0.5, 0.5, 0.5, 0.5])
    scale = recorded["spatial_scale"]
    return make(features_shape, rois, recorded["output_size"], spatial_scale=scale, **options)


def largest_difference(actual, expected):
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max()


def assert_close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance


def assert_gradient(actual, expected):
    """A recorded gradient is a float32 sum in its own order: off by a share of the largest."""
    assert_close(actual, expected, 2e-6 * np.abs(expected).max())


def test_recordings_are_there():
    assert len(RECORDINGS) == 24
    systems = {name.partition("-")[0] for name in RECORDINGS}
    assert systems == {"torchvision", "onnxruntime", "openvino", "tensorflow", "chainer"}


@pytest.mark.parametrize(
    "name", [name for name in RECORDINGS if "multiscale" not in name], ids=lambda name: name[:-4]
)
def test_recorded_values_and_gradients(name):
    recorded = load(name)
    weights = weights_of(recorded)
    if recorded["op"] == "crop_and_resize":
        pooled = average_oracle.crop_and_resize(
            *(recorded[key] for key in ("x", "boxes", "box_indices", "output_size")),
            recorded["extrapolation_value"],
        )
    else:
        pooled = average_oracle.pool(recorded["x"], weights)
    assert_close(pooled, recorded["out"], tolerance_of(name))
    if "grad" in recorded and recorded["op"] != "ps_roi_pool":
        grad = average_oracle.pool_grad(recorded["g"], recorded["x"].shape, weights)
        assert_gradient(grad, recorded["grad"])


@pytest.mark.parametrize("name", named("torchvision-roi_align"), ids=lambda name: name[:-4])
def test_torchvisions_bits(name):
    recorded = load(name)
    how = (recorded["spatial_scale"], recorded["sampling_ratio"], recorded["aligned"])
    pooled = average_oracle.roi_align_in_order(
        recorded["x"], recorded["rois"], recorded["output_size"], *how
    )
    np.testing.assert_array_equal(pooled, recorded["out"])
    grad = average_oracle.roi_align_grad_in_order(
        recorded["g"], recorded["x"].shape, recorded["rois"], *how
    )
    np.testing.assert_array_equal(grad, recorded["grad"])


@pytest.mark.parametrize("name", named("ps_roi_pool"), ids=lambda name: name[:-4])
def test_torchvisions_ps_roi_pool_has_the_gradient_of_another_forward_pass(name):
    recorded = load(name)
    shape = recorded["x"].shape
    grads = [
        average_oracle.pool_grad(recorded["g"], shape, weights_of(recorded, unread=unread))
        for unread in (0, 1)
    ]
    assert_gradient(grads[0], recorded["grad"])
    assert np.abs(grads[1] - recorded["grad"]).max() > 0.1


@pytest.mark.parametrize("name", named("crop_and_resize"), ids=lambda name: name[:-4])
def test_recorded_gradients_of_boxes(name):
    recorded = load(name)
    grad = average_oracle.box_grad(recorded["g"], recorded["x"], weights_of(recorded))
    expected = recorded["grad_boxes"]
    off = np.abs(grad - expected).max(axis=1) > 2e-6 * np.abs(expected).max()
    # Of two boxes the last sample is cell 0 to within a rounding: TensorFlow's forward pass takes
    # it for one outside, as here, and its backward pass for one inside.
    assert off.sum() <= 2
    assert (recorded["boxes"][off, 3] == 0).all()


@pytest.mark.parametrize("name", named("multiscale"), ids=lambda name: name[:-4])
def test_recorded_levels(name):
    recorded = load(name)
    size, level = recorded["canonical"].tolist()
    levels = average_oracle.assign_levels(recorded["rois"], recorded["spatial_scales"], size, level)
    # torchvision makes a number past all levels of a NaN.
    expected = np.where(recorded["level"] > 3, -1, recorded["level"])
    np.testing.assert_array_equal(levels, expected)
    assert set(levels) == {-1, 0, 1, 2, 3}

    of_each_level = []
    for i, scale in enumerate(recorded["spatial_scales"]):
        features = recorded[f"x{i}"]
        weights = average_oracle.roi_align_weights(
            *(features.shape, recorded["rois"], recorded["output_size"]),
            *(scale, recorded["sampling_ratio"], False),
            roi_mask=levels == i,
        )
        of_each_level.append(average_oracle.pool(features, weights))
        grad = average_oracle.pool_grad(recorded["g"], features.shape, weights)
        assert_gradient(grad, recorded[f"grad{i}"])
    pooled = average_oracle.pool_levels(of_each_level, levels)
    assert_close(pooled, recorded["out"], tolerance_of(name))


BOXES = np.array([[0.3, -1.7], [2.25, 9.5], [1.0, 1.5], [-3.0, 4.4], [2.0, 2.0]])


@pytest.mark.parametrize(("start", "stop"), BOXES[BOXES[:, 0] < BOXES[:, 1]].tolist())
def test_precise_roi_pooling_is_the_integral_of_the_surface(start, stop):
    bins, size, parts = 3, 7, 20_000
    weights = average_oracle.pr_axis(start, stop, bins, size)[0]
    middle = (np.arange(bins * parts) + 0.5) / (bins * parts)
    x = start + (stop - start) * middle
    hats = np.maximum(1 - np.abs(x[:, None] - np.arange(size)), 0)
    np.testing.assert_allclose(weights, hats.reshape(bins, parts, size).mean(axis=1), atol=1e-7)


@pytest.mark.parametrize(("start", "stop"), BOXES.tolist())
def test_slopes_of_precise_roi_pooling_are_those_of_its_weights(start, stop):
    bins, size, h = 3, 7, 1e-6
    slopes = average_oracle.pr_axis(start, stop, bins, size)[1:]
    for slope, (by_start, by_stop) in zip(slopes, ((h, 0), (0, h)), strict=True):
        before, after = (
            average_oracle.pr_axis(start + s * by_start, stop + s * by_stop, bins, size)[0]
            for s in (-1, 1)
        )
        if stop != start:  # there, weights jump
            np.testing.assert_allclose(slope, (after - before) / (2 * h), atol=1e-5)


def test_gradient_of_rois_is_that_of_the_values():
    rng = np.random.default_rng(0)
    features, cotangent = rng.normal(size=(2, 8, 9, 3)), rng.normal(size=(1, 2, 4, 3))
    roi, h = np.float32([[1, 3, 5, 11.5, 13]]), 2**-8  # float32 has the sums with h

    def value(roi):
        weights = average_oracle.pr_roi_pool_weights(features.shape, roi, (2, 4), 0.5)
        return weights, (average_oracle.pool(features, weights) * cotangent).sum()

    grad = average_oracle.box_grad(cotangent, features, value(roi)[0])
    for i in range(4):
        step = h * np.eye(5, dtype=np.float32)[1 + i]
        numeric = (value(roi + step)[1] - value(roi - step)[1]) / (2 * h)
        np.testing.assert_allclose(grad[0, i], numeric, atol=1e-4)


def test_huge_rois_cost_no_more_than_the_map():
    roi = np.float32([[-1e9, -3e8, 2e9, 1e9], [0, 0, 1e30, 4]])
    weights = average_oracle.roi_align_weights((8, 9, 1), roi, (7, 7))
    # Both ends are kept within 2**29 cells: bins of 153 million cells, one of which has the map.
    assert weights.columns[0].sum() < 1e-6
    np.testing.assert_allclose(weights.rows[1].sum(axis=1), 1)


def test_cells_without_weight_are_not_read():
    features = np.full((4, 4, 1), np.nan)
    features[1, 1] = 3
    weights = average_oracle.roi_align_weights(features.shape, np.float32([[1, 1, 2, 2]]), (1, 1))
    weights.rows[0], weights.columns[0] = ([[0, 1, 0, 0]],) * 2
    assert average_oracle.pool(features, weights).item() == 3
