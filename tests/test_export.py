"""`jax.export`: one artifact for every platform, none of its safety checks turned off."""

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


def pool(convention):
    def pool(features, rois, spatial_scale, roi_mask):
        return jax_roipool.roi_pool_with_argmax(
            features,
            rois,
            OUTPUT_SIZE,
            spatial_scale=spatial_scale,
            roi_mask=roi_mask,
            convention=convention,
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


def test_artifact_holds_no_custom_calls_of_this_machine():
    # A call into a library of this process would not survive the journey.
    exported = export.export(jax.jit(pool("torchvision")), platforms=PLATFORMS)(*ARGUMENTS)
    assert exported.disabled_safety_checks == ()
    assert_same(exported.call(*ARGUMENTS)[0], expected("torchvision")[0])
