"""The shapes and dtypes of the signature, checked by jaxtyping on real calls."""
# jaxtyping's axis names are not forward references.
# ruff: noqa: F722

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import Array, Bool, Float, Int32, Num, Real, jaxtyped

import jax_roipool
from harness import assert_same

typed = jaxtyped(typechecker=beartype)
ROWS, COLUMNS = 2, 3


@typed
def one_image(
    features: Num[Array, "H W C"], rois: Real[Array, "K 4"], **options
) -> Num[Array, f"K {ROWS} {COLUMNS} C"]:
    return jax_roipool.roi_pool(features, rois, (ROWS, COLUMNS), **options)


@typed
def per_image(
    features: Num[Array, "N H W C"],
    rois: Real[Array, "N K 4"],
    roi_mask: Bool[Array, "N K"] | None = None,
    **options,
) -> Num[Array, f"N K {ROWS} {COLUMNS} C"]:
    return jax_roipool.roi_pool(features, rois, (ROWS, COLUMNS), roi_mask=roi_mask, **options)


@typed
def flat(
    features: Num[Array, "N H W C"],
    rois: Real[Array, "R 5"],
    roi_mask: Bool[Array, " R"] | None = None,
    **options,
) -> Num[Array, f"R {ROWS} {COLUMNS} C"]:
    return jax_roipool.roi_pool(features, rois, (ROWS, COLUMNS), roi_mask=roi_mask, **options)


@typed
def with_argmax(
    features: Num[Array, "N H W C"], rois: Real[Array, "R 5"], **options
) -> tuple[Num[Array, f"R {ROWS} {COLUMNS} C"], Int32[Array, f"R {ROWS} {COLUMNS} C"]]:
    return jax_roipool.roi_pool_with_argmax(features, rois, (ROWS, COLUMNS), **options)


@typed
def gradient(
    features: Float[Array, "N H W C"], rois: Float[Array, "R 5"], **options
) -> Float[Array, "N H W C"]:
    return jax.grad(lambda features: jnp.sum(flat(features, rois, **options)))(features)


DTYPES = (jnp.bfloat16, jnp.int8)


# Every row and column of a RoI over the whole of these maps reaches the value 1.
def test_each_layout_returns_its_documented_shape():
    n, h, w, c, k = 3, 5, 4, 2, 6
    features = jnp.ones((n, h, w, c))
    boxes = jnp.tile(jnp.asarray([0.0, 0, w, h]), (n, k, 1))
    flat_boxes = jnp.concatenate([jnp.zeros((n * k, 1)), boxes.reshape(n * k, 4)], axis=1)
    assert np.all(one_image(features[0], boxes[0]) == 1)
    assert np.all(per_image(features, boxes, jnp.ones((n, k), bool)) == 1)
    assert np.all(flat(features, flat_boxes, jnp.ones(n * k, bool)) == 1)
    pooled, argmax = with_argmax(features, flat_boxes)
    assert np.all(pooled == 1)
    assert np.all(argmax >= 0)
    assert np.sum(gradient(features, flat_boxes)) == n * k * ROWS * COLUMNS * c


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_has_the_features_dtype(dtype):
    features = jnp.full((4, 4, 2), 3, dtype)
    boxes = jnp.asarray([[0, 0, 4, 4]], jnp.int32)
    pooled = one_image(features, boxes)
    assert_same(pooled, np.full((1, ROWS, COLUMNS, 2), 3, dtype))


def test_shapes_are_known_without_running():
    features = jax.ShapeDtypeStruct((2, 50, 60, 256), jnp.bfloat16)
    rois = jax.ShapeDtypeStruct((1000, 5), jnp.float32)
    pooled, argmax = jax.eval_shape(with_argmax, features, rois)
    assert (pooled.shape, pooled.dtype) == ((1000, ROWS, COLUMNS, 256), jnp.bfloat16)
    assert (argmax.shape, argmax.dtype) == ((1000, ROWS, COLUMNS, 256), jnp.int32)


def test_output_size_is_rows_then_columns():
    features = jnp.arange(12.0).reshape(3, 4, 1)
    pooled = jax_roipool.roi_pool(features, jnp.asarray([[0.0, 0, 4, 3]]), (3, 2))
    assert pooled[0, ..., 0].tolist() == [[1, 3], [5, 7], [9, 11]]


def test_integer_output_size_is_square():
    features, rois = jnp.arange(16.0).reshape(4, 4, 1), jnp.asarray([[0.0, 0, 4, 4]])
    square = jax_roipool.roi_pool(features, rois, 2)
    assert square[0, ..., 0].tolist() == [[5, 7], [13, 15]]


def test_layouts_agree():
    features = jnp.arange(2 * 5 * 6 * 3.0).reshape(2, 5, 6, 3) % 17
    boxes = jnp.asarray([[[0.0, 0, 5, 5], [2, 1, 6, 4]], [[1, 1, 3, 3], [-2, 0, 9, 2]]])
    options = {"convention": "openvino"}
    batch = per_image(features, boxes, **options)
    indices = jnp.repeat(jnp.arange(2.0), 2)[:, None]
    rows = flat(features, jnp.concatenate([indices, boxes.reshape(4, 4)], axis=1), **options)
    assert np.any(batch)
    assert_same(rows.reshape(batch.shape), np.asarray(batch))
    for i in range(2):
        assert_same(one_image(features[i], boxes[i], **options), np.asarray(batch[i]))
