"""The segment-max backend's own seams: chunks of RoIs, and maps past an int32 index."""

import jax
import numpy as np
import pytest

import jax_roipool
import oracle
from harness import assert_same, distinct_features, random_rois, resolved, whole_cotangent
from jax_roipool._backends.rectangle_max import indexing, segment_max

FEATURES = distinct_features((3, 8, 9, 4))
ROIS = random_rois(7, 8, 9, images=3)
COTANGENT = whole_cotangent((7, 2, 3, 4))


def pool_and_gradient():
    jax.clear_caches()

    def pool(features):
        return jax_roipool.roi_pool_with_argmax(
            features, ROIS, (2, 3), convention="torchvision", implementation="segment_max"
        )

    pooled, pullback, argmax = jax.vjp(pool, FEATURES, has_aux=True)
    return pooled, argmax, pullback(COTANGENT)[0]


@pytest.fixture(scope="module")
def want():
    pooled, argmax = oracle.roi_pool(FEATURES, ROIS, (2, 3), resolved("torchvision"))
    gradient = oracle.roi_pool_grad(COTANGENT, argmax, FEATURES.shape, ROIS)
    return pooled, argmax, gradient.astype(np.float32)


@pytest.mark.parametrize("rois_at_once", (2, 3))
def test_chunks_change_nothing(rois_at_once, want, monkeypatch):
    bytes_per_roi = FEATURES[0].nbytes
    monkeypatch.setattr(segment_max, "CHUNK_BYTES", rois_at_once * bytes_per_roi)
    for got, expected in zip(pool_and_gradient(), want, strict=True):
        assert_same(got, expected)


def test_gradient_of_a_map_past_int32(want, monkeypatch):
    monkeypatch.setattr(indexing, "INDEX_LIMIT", FEATURES.size)
    assert_same(pool_and_gradient()[2], want[2])


def test_rois_are_taken_in_chunks_that_fit():
    # 128 RoIs on this map would take 498 MB at once.
    features = jax.ShapeDtypeStruct((1, 38, 50, 512), np.float32)
    rois = jax.ShapeDtypeStruct((1, 128, 4), np.float32)
    compiled = (
        jax.jit(lambda *args: jax_roipool.roi_pool(*args, 7, implementation="segment_max"))
        .lower(features, rois)
        .compile()
    )
    map_bytes = 38 * 50 * 512 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * map_bytes
