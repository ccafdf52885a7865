"""TensorFlow's crops: from images and boxes to crops of one size."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_roipool._backends.weighted_sum import FAMILY
from jax_roipool._rois import (
    FLOAT_DTYPES,
    as_array,
    canonical_features,
    canonical_rois,
    check_image_index,
    check_output_size,
    describe,
    is_real,
)
from jax_roipool._taps import crop_taps
from jax_roipool._weighted_sum import weighted_sum


def crop_and_resize(
    images: ArrayLike,
    boxes: ArrayLike,
    box_indices: ArrayLike,
    crop_size: int | tuple[int, int],
    *,
    extrapolation_value: float = 0.0,
    implementation: str | None = None,
) -> jax.Array:
    """Crops of images, each resized to P x Q by bilinear samples, as in TensorFlow.

    A box is in fractions of its image's extent, `(y1, x1, y2, x2)`: 0 is the centre of the first
    row or column, 1 that of the last. Its corners are samples, and the others lie evenly between; a
    crop of one row or column has its sample in the middle. A sample outside of the image is
    `extrapolation_value`. A box with `y1 > y2` or `x1 > x2` gives a mirrored crop. Images and boxes
    have a gradient.

    A box that is not finite, and one whose index names no image, are `extrapolation_value` all over
    and pass no gradient.

    Args:
      images: `[N, H, W, C]`, floating, of 16 bits or more.
      boxes: `[R, 4]`, floating or integer. Samples are computed in float32.
      box_indices: integer, `[R]`: the index of each box's image.
      crop_size: `(P, Q)`, rows and columns of a crop, or one int for both.
      extrapolation_value: a number.
      implementation: as in `jax_roipool.roi_align`.

    Returns:
      `[R, P, Q, C]`, of the images' dtype.

    Raises:
      TypeError: a dtype that cannot be averaged, or that cannot be coordinates or indices.
      ValueError: shapes that do not go together, or a crop size that is not positive.

    It equals `tf.image.crop_and_resize` with its method `"bilinear"`.

    >>> import jax.numpy as jnp
    >>> from jax_roipool import crop_and_resize
    >>> images = jnp.arange(16.0).reshape(1, 4, 4, 1)
    >>> crop_and_resize(images, jnp.array([[0, 0, 1, 1], [0.5, 0, 1.5, 1]]), [0, 0], 2)[..., 0]
    Array([[[ 0.,  3.],
            [12., 15.]],
    <BLANKLINE>
           [[ 6.,  9.],
            [ 0.,  0.]]], dtype=float32)
    """
    images, boxes = as_array("images", images), as_array("boxes", boxes)
    if images.dtype.name not in FLOAT_DTYPES:
        raise TypeError(
            f"images must be of one of the dtypes {', '.join(FLOAT_DTYPES)}, got "
            f"{describe(images)}; convert them, for example with .astype(jnp.float32)"
        )
    if not is_real(boxes.dtype):
        raise TypeError(f"boxes must be of a real dtype, got {describe(boxes)}")
    if images.ndim != 4 or boxes.ndim != 2 or boxes.shape[1] != 4 or 0 in images.shape[1:3]:
        raise ValueError(
            "images and boxes must be [N, H, W, C], of at least one cell, and [R, 4], got "
            f"{describe(images)} and {describe(boxes)}"
        )
    box_indices = check_image_index(box_indices, boxes, "box_indices", "boxes")
    outside = as_array("extrapolation_value", extrapolation_value)
    if not is_real(outside.dtype) or outside.shape != ():
        raise TypeError(f"extrapolation_value must be a real number, got {describe(outside)}")
    FAMILY.check_name(implementation)
    return _crop_and_resize(
        images,
        boxes,
        box_indices,
        outside,
        crop_size=check_output_size(crop_size, "crop_size"),
        implementation=implementation,
    )


@functools.partial(jax.jit, static_argnames=("crop_size", "implementation"))
def _crop_and_resize(images, boxes, box_indices, outside, *, crop_size, implementation):
    maps = canonical_features(images, boxes)
    _, n, H, W, _ = maps.shape
    boxes = boxes[..., np.array([1, 0, 3, 2])]
    index, boxes = canonical_rois(boxes, box_indices, None, jnp.float32(1), n)
    taps, inside = crop_taps(index, boxes, crop_size, (H, W))
    crops = weighted_sum(maps, taps, implementation)
    return jnp.where(inside[..., None], crops, outside.astype(crops.dtype))[0]
