"""`jax.export`: portable artifacts with every safety check on, native ones by name."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jax_roipool
import oracle
from harness import PRESETS, assert_same, distinct_features, random_rois, resolved

PLATFORMS = ("cpu", "cuda", "tpu")
OUTPUT_SIZE = (2, 3)
FEATURES = distinct_features((2, 6, 7, 2))
ROIS = random_rois(5, 6, 7, images=2)
MASK = jnp.asarray([True, True, False, True, True])
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
    allowed = [export.DisabledSafetyCheck.custom_call(name) for name in jax_roipool.CUSTOM_CALLS]
    program = export.export(jax.jit(jax.grad(loss)), platforms=PLATFORMS, disabled_checks=allowed)
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
