"""`jax.export`: portable artifacts with every safety check on, native ones by name."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jax_roipool
import oracle
from harness import (
    PRESETS,
    assert_same,
    distinct_features,
    random_rois,
    resolved,
    some_by_default,
)

pytestmark = pytest.mark.usefixtures("on_the_cpu")

PLATFORMS = ("cpu", "cuda", "tpu")
OUTPUT_SIZE = (2, 3)
FEATURES = distinct_features((2, 6, 7, 2))
ROIS = random_rois(5, 6, 7, images=2)
MASK = jnp.asarray([True, True, False, True, True])
ALLOWED = [export.DisabledSafetyCheck.custom_call(name) for name in jax_roipool.CUSTOM_CALLS]
ARGUMENTS = (FEATURES, ROIS, jnp.float32(0.7), MASK)


def pool(convention, implementation="xla"):
    def pool(features, rois, spatial_scale, roi_mask):
        return jax_roipool.roi_pool_with_argmax(
            features,
            rois,
            OUTPUT_SIZE,
            spatial_scale=spatial_scale,
            roi_mask=roi_mask,
            convention=convention,
            implementation=implementation,
        )

    return pool


def expected(convention):
    return oracle.roi_pool(FEATURES, ROIS, OUTPUT_SIZE, resolved(convention), 0.7, MASK)


def round_trip(exported, **options):
    return export.deserialize(exported.serialize(**options))


@pytest.mark.parametrize("convention", PRESETS)
def test_artifact_for_every_platform_runs_here(convention):
    exported = export.export(jax.jit(pool(convention)), platforms=PLATFORMS)(*ARGUMENTS)
    restored = round_trip(exported)
    assert restored.platforms == PLATFORMS
    for actual, wanted in zip(restored.call(*ARGUMENTS), expected(convention), strict=True):
        assert_same(actual, wanted)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_artifact_for_one_platform(platform):
    exported = export.export(jax.jit(pool("partition")), platforms=(platform,))(*ARGUMENTS)
    restored = round_trip(exported)
    assert restored.platforms == (platform,)
    if platform == jax.default_backend():
        assert_same(restored.call(*ARGUMENTS)[0], expected("partition")[0])


def test_restored_artifact_can_be_differentiated():
    def loss(features):
        return jnp.sum(pool("torchvision")(features, *ARGUMENTS[1:])[0] ** 2)

    exported = export.export(jax.jit(loss), platforms=PLATFORMS)(FEATURES)
    restored = round_trip(exported, vjp_order=1)
    pooled, argmax = expected("torchvision")
    grad = oracle.roi_pool_grad(2 * pooled, argmax, FEATURES.shape, ROIS)
    assert np.any(grad)
    assert_same(jax.grad(restored.call)(FEATURES), grad.astype(np.float32))


def test_exported_gradient():
    def loss(features):
        return jnp.sum(pool("chainer")(features, *ARGUMENTS[1:])[0][0])

    exported = export.export(jax.jit(jax.grad(loss)), platforms=PLATFORMS)(FEATURES)
    pooled, argmax = expected("chainer")
    cotangent = np.zeros(pooled.shape)
    cotangent[0] = 1
    grad = oracle.roi_pool_grad(cotangent, argmax, FEATURES.shape, ROIS)
    assert np.any(grad)
    assert_same(round_trip(exported).call(FEATURES), grad.astype(np.float32))


def test_exported_vmap():
    batched = jax.jit(jax.vmap(pool("partition"), (None, 0, None, 0)))
    rois, masks = jnp.stack([ROIS, ROIS[::-1]]), jnp.stack([MASK, MASK[::-1]])
    arguments = (FEATURES, rois, jnp.float32(0.7), masks)
    exported = export.export(batched, platforms=PLATFORMS)(*arguments)
    pooled, argmax = round_trip(exported).call(*arguments)
    wanted, wanted_argmax = expected("partition")
    assert_same(pooled, np.stack([wanted, wanted[::-1]]))
    assert_same(argmax, np.stack([wanted_argmax, wanted_argmax[::-1]]))


def test_portable_artifact_holds_no_custom_calls_of_this_machine():
    # A call into a library of this process would not survive the journey.
    exported = export.export(jax.jit(pool("torchvision")), platforms=PLATFORMS)(*ARGUMENTS)
    assert exported.disabled_safety_checks == ()
    assert_same(exported.call(*ARGUMENTS)[0], expected("torchvision")[0])


# Symbolic shapes: one program, and maps, batches and RoIs of several sizes through it.

SIZES = ({"n": 2, "k": 3, "h": 7, "w": 9, "c": 2}, {"n": 1, "k": 5, "h": 4, "w": 30, "c": 3})
SYMBOLIC = {
    "rois": ("2, 7, 9, 3", "2, k, 4"),
    "all but the map's size": ("n, 7, 9, c", "n, k, 4"),
    "the map's size": ("2, h, w, 3", "2, 4, 4"),
    "all": ("n, h, w, c", "n, k, 4"),
    "one image": ("h, w, c", "k, 4"),
    "flat": ("n, h, w, c", "k, 5"),
}


def exported_with_symbols(shapes, function, platforms):
    scope = export.SymbolicScope()
    arguments = [
        jax.ShapeDtypeStruct(export.symbolic_shape(shape, scope=scope), dtype)
        for shape, dtype in zip(shapes, (np.float32, np.float32, np.bool_), strict=True)
    ]
    program = export.export(jax.jit(function), platforms=platforms, disabled_checks=ALLOWED)
    return round_trip(program(*arguments))


@pytest.mark.parametrize("implementation", (None, "blocks"))
@pytest.mark.parametrize("case", some_by_default(SYMBOLIC, ("all", "flat")))
def test_symbolic_shapes(case, implementation):
    features_shape, rois_shape = SYMBOLIC[case]
    mask_shape = rois_shape.rpartition(",")[0]

    def both(features, rois, roi_mask):
        def pool(features):
            return jax_roipool.roi_pool(
                features,
                rois,
                OUTPUT_SIZE,
                roi_mask=roi_mask,
                convention="chainer",
                implementation=implementation,
            )

        pooled, pullback = jax.vjp(pool, features)
        return pooled, *pullback(jnp.ones_like(pooled))

    shapes = features_shape, rois_shape, mask_shape
    program = exported_with_symbols(shapes, both, platforms=("cpu",))
    for sizes in SIZES:
        shape, rois_of, mask_of = (
            [int(sizes.get(size.strip(), size)) for size in text.split(",")] for text in shapes
        )
        features = np.asarray(distinct_features(shape))
        rois = np.random.default_rng(0).uniform(0, 9, rois_of).astype(np.float32)
        if case == "flat":
            rois[:, 0] = np.arange(len(rois)) % shape[0]
        mask = np.arange(np.prod(mask_of)).reshape(mask_of) % 3 > 0
        pooled, gradient = program.call(features, rois, mask)
        wanted, argmax = oracle.roi_pool(
            features, rois, OUTPUT_SIZE, resolved("chainer"), roi_mask=mask
        )
        assert_same(pooled, wanted)
        wanted = oracle.roi_pool_grad(np.ones(pooled.shape), argmax, features.shape, rois)
        assert_same(gradient, wanted.astype(np.float32))


AVERAGES = {
    "align": functools.partial(jax_roipool.roi_align, sampling_ratio=2),
    "adaptive": jax_roipool.roi_align,
    "whole cells": jax_roipool.roi_average_pool,
    "precise": jax_roipool.pr_roi_pool,
}


@pytest.mark.parametrize("name", some_by_default(AVERAGES, ("adaptive",)))
def test_symbolic_shapes_of_averages(name):
    def averages(features, rois, roi_mask):
        def pool(features, rois):
            return AVERAGES[name](features, rois, OUTPUT_SIZE, roi_mask=roi_mask)

        pooled, pullback = jax.vjp(pool, features, rois)
        return pooled, pullback(jnp.ones_like(pooled))

    shapes = "n, h, w, c", "n, k, 4", "n, k"
    program = exported_with_symbols(shapes, averages, platforms=("cpu",))
    for n, k, h, w, c in ((2, 3, 7, 9, 2), (1, 5, 4, 30, 3)):
        rois = np.stack([random_rois(k, h, w, seed) for seed in range(n)])
        arguments = distinct_features((n, h, w, c)), rois, np.arange(n * k).reshape(n, k) % 3 > 0
        for actual, wanted in zip(
            jax.tree.leaves(program.call(*arguments)),
            jax.tree.leaves(jax.jit(averages)(*arguments)),
            strict=True,
        ):
            np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)


def test_symbolic_crops():
    def crop(images, boxes, image_index):
        return jax_roipool.crop_and_resize(images, boxes, image_index, OUTPUT_SIZE)

    scope = export.SymbolicScope()
    program = export.export(jax.jit(crop), platforms=("cpu",), disabled_checks=ALLOWED)(
        *(
            jax.ShapeDtypeStruct(export.symbolic_shape(shape, scope=scope), dtype)
            for shape, dtype in (("n, h, w, 3", np.float32), ("r, 4", np.float32), ("r", np.int32))
        )
    )
    for n, r, h, w in ((2, 3, 7, 9), (1, 5, 4, 30)):
        images, boxes = distinct_features((n, h, w, 3)), random_rois(r, 1, 1)
        arguments = images, boxes, np.arange(r, dtype=np.int32) % n
        assert_same(program.call(*arguments), jax.jit(crop)(*arguments))


@pytest.mark.parametrize("platform", ("tpu", "cuda"))
def test_symbolic_shapes_have_a_portable_backend_on_every_platform(platform):
    def pool(features, rois, roi_mask):
        align = jax_roipool.roi_align(features, rois, 2, roi_mask=roi_mask)
        return align, jax_roipool.roi_pool(features, rois, 2, roi_mask=roi_mask)

    program = exported_with_symbols(("n, h, w, c", "n, k, 4", "n, k"), pool, (platform,))
    assert "custom_call @tpu" not in program.mlir_module()


@pytest.mark.parametrize("implementation", ("dense", "segment_max"))
def test_backends_that_need_every_shape_say_so(implementation):
    def pool(features, rois, roi_mask):
        return jax_roipool.roi_pool(
            features, rois, 2, roi_mask=roi_mask, implementation=implementation
        )

    with pytest.raises(ValueError, match=r"has to know every shape.*'blocks'"):
        exported_with_symbols(("n, h, w, c", "n, k, 4", "n, k"), pool, ("cpu",))


def loss(features):
    return jnp.sum(pool("torchvision", None)(features, *ARGUMENTS[1:])[0] ** 2)


def test_artifact_for_tpus_has_the_kernels_and_needs_no_allowance():
    program = export.export(jax.jit(jax.grad(loss)), platforms=("tpu",))
    restored = round_trip(program(FEATURES))
    assert restored.platforms == ("tpu",)
    assert restored.mlir_module().count("tpu_custom_call") == 2


def test_native_artifact_needs_its_custom_calls_named(native):
    with pytest.raises(ValueError, match="jax_roipool_cpu_"):
        export.export(jax.jit(jax.grad(loss)))(FEATURES)


def test_native_artifact_runs_in_a_process_that_has_pooled_nothing(native, tmp_path):
    program = export.export(jax.jit(jax.grad(loss)), platforms=PLATFORMS, disabled_checks=ALLOWED)
    (tmp_path / "program").write_bytes(program(FEATURES).serialize())
    np.save(tmp_path / "features.npy", FEATURES)
    code = f"""
import pathlib, jax_roipool, numpy as np
from jax import export
folder = pathlib.Path({str(tmp_path)!r})
program = export.deserialize(bytearray((folder / "program").read_bytes()))
jax_roipool.register_custom_calls()
np.save(folder / "gradient.npy", program.call(np.load(folder / "features.npy")))
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=300)
    pooled, argmax = expected("torchvision")
    gradient = oracle.roi_pool_grad(2 * pooled, argmax, FEATURES.shape, ROIS)
    assert np.any(gradient)
    assert_same(np.load(tmp_path / "gradient.npy"), gradient.astype(np.float32))
