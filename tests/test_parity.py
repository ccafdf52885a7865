"""Recorded answers of other systems, in `fixtures/`.

`torchvision-*` come from torchvision, `openvino-*` from OpenVINO's CPU plugin, `chainer-*` from
Chainer's `roi_max_pooling_2d`. "edges" holds 300 RoI lengths at 7 or 14 bins, "typical" ordinary
RoIs, "hostile" RoIs outside the map, inverted and huge.
"""

import pathlib

import numpy as np
import pytest

import interpreted_tpu
import jax_roipool
import oracle
from harness import assert_same, pool, pool_and_grad

FIXTURES = sorted((pathlib.Path(__file__).parent / "fixtures").glob("*.npz"))


def load(path):
    with np.load(path) as recorded:
        return dict(recorded)


def test_fixtures_are_there():
    systems = {path.name.partition("-")[0] for path in FIXTURES}
    assert systems == {"torchvision", "openvino", "chainer"}


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_recorded_answers(path):
    check(path, implementation=None)


@pytest.mark.parametrize(
    "path", [path for path in FIXTURES if "hostile" in path.stem][::2], ids=lambda path: path.stem
)
@pytest.mark.parametrize("implementation", ("blocks", "dense", "segment_max"))
@pytest.mark.full
def test_portable_backends_give_recorded_answers(path, implementation):
    check(path, implementation)


def check(path, implementation):
    recorded = load(path)
    convention = path.name.partition("-")[0]
    output_size = tuple(recorded["output_size"].tolist())
    cotangent = recorded.get("g", np.ones_like(recorded["out"]))
    run = pool_and_grad(output_size, convention, implementation)
    pooled, argmax, grad = run(
        recorded["x"], recorded["rois"], cotangent, float(recorded["spatial_scale"])
    )
    assert_same(pooled, recorded["out"])
    if "argmax" in recorded:
        assert_same(argmax, recorded["argmax"])
    if "grad" in recorded:
        # The sums are taken in another order.
        np.testing.assert_allclose(grad, recorded["grad"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "path", [path for path in FIXTURES if "hostile" in path.stem][::2], ids=lambda path: path.stem
)
@pytest.mark.full
def test_the_tpu_kernels_give_recorded_answers(path, interpreter):
    recorded = load(path)
    output_size = tuple(recorded["output_size"].tolist())
    run = pool(output_size, path.name.partition("-")[0], interpreted_tpu.NAME)
    pooled, argmax = run(recorded["x"], recorded["rois"][:8], float(recorded["spatial_scale"]))
    assert_same(pooled, recorded["out"][:8])
    if "argmax" in recorded:
        assert_same(argmax, recorded["argmax"][:8])


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_oracle_gives_the_recorded_answers(path):
    recorded = load(path)
    # The oracle is slow: of the three hundred RoIs in "edges", some.
    kept = slice(None, None, 1 if len(recorded["rois"]) < 100 else 9)
    pooled, argmax = oracle.roi_pool(
        recorded["x"],
        recorded["rois"][kept],
        recorded["output_size"].tolist(),
        jax_roipool.CONVENTIONS[path.name.partition("-")[0]],
        recorded["spatial_scale"],
    )
    assert_same(pooled, recorded["out"][kept])
    if "argmax" in recorded:
        assert_same(argmax, recorded["argmax"][kept])
        argmax = recorded["argmax"]
    if "grad" in recorded:
        grad = oracle.roi_pool_grad(recorded["g"], argmax, recorded["x"].shape, recorded["rois"])
        np.testing.assert_allclose(grad, recorded["grad"], rtol=1e-5, atol=1e-5)


def test_openvino_list_terminator_is_not_imitated():
    # OpenVINO stops at the first image index of -1; here only that RoI is bad.
    features = np.ones((1, 4, 4, 1), np.float32)
    rois = np.array([[0, 0, 0, 3, 3], [-1, 0, 0, 3, 3], [0, 0, 0, 3, 3]], np.float32)
    cotangent = np.ones((3, 1, 1, 1), np.float32)
    pooled, _, _ = pool_and_grad((1, 1), "openvino")(features, rois, cotangent)
    assert pooled.ravel().tolist() == [1, 0, 1]


@pytest.mark.parametrize("value", (np.nan, -np.inf))
def test_torchvision_lowest_float_is_not_imitated(value):
    # torchvision starts from the lowest float: NaN and -inf never exceed it, and get lost.
    features = np.full((1, 2, 2, 1), value, np.float32)
    rois = np.array([[0, 0, 0, 1, 1]], np.float32)
    cotangent = np.ones((1, 1, 1, 1), np.float32)
    run = pool_and_grad((1, 1), "torchvision")
    pooled, argmax, grad = run(features, rois, cotangent)
    assert_same(pooled, np.full((1, 1, 1, 1), value, np.float32))
    assert argmax.ravel().tolist() == [0]
    assert grad.ravel().tolist() == [1, 0, 0, 0]


def test_chainer_cpu_rounding_to_even_is_not_imitated():
    # Chainer rounds half to even on the CPU and half away from zero on the GPU.
    features = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    rois = np.array([[0, 0.5, 2.5, 0.5, 2.5]], np.float32)
    cotangent = np.ones((1, 1, 1, 1), np.float32)
    run = pool_and_grad((1, 1), "chainer")
    pooled, _, _ = run(features, rois, cotangent)
    assert pooled.ravel().tolist() == [13]
