"""RoIAlign: from features and RoIs to bins' means of bilinear samples."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jax_roipool._averages import average
from jax_roipool._rois import check_pair
from jax_roipool._taps import MAX_SAMPLES, align_taps


def roi_align(
    features: ArrayLike,
    rois: ArrayLike,
    output_size: int | tuple[int, int],
    spatial_scale: ArrayLike = 1.0,
    *,
    sampling_ratio: int | tuple[int, int] | None = None,
    aligned: bool = True,
    image_index: ArrayLike | None = None,
    roi_mask: ArrayLike | None = None,
    implementation: str | None = None,
    features_spec: PartitionSpec | None = None,
) -> jax.Array:
    """Mean of bilinear samples in each of P x Q bins of every region of interest (RoI).

    A RoI's coordinates, times `spatial_scale`, give a rectangle, which is split into P x Q equal
    bins; nothing is rounded to cells. In each bin lie samples, evenly spaced, and each is the
    bilinear interpolation of the four cells around it. A sample outside of the map is that of the
    nearest cells if it is within a cell of the map, and else 0. A bin pools to the mean of its
    samples.

    The samples are where torchvision's float32 arithmetic has them, to the last bit. The gradient
    of the features is the exact transpose; RoIs have none. Forward mode works as well.

    A RoI that `roi_mask` excludes, one with a coordinate that is not finite, and one whose image
    index names no image pool to 0 and pass no gradient. So do all if a traced `spatial_scale` is
    not finite.

    Args:
      features: `[H, W, C]` or `[N, H, W, C]`, floating, of 16 bits or more. Sums are float32, or
        float64 if the features are.
      rois: as in `jax_roipool.roi_pool`: `[K, 4]`, `[N, K, 4]`, `[R, 5]`, or `[R, 4]` with an
        `image_index`; `(x1, y1, x2, y2)` in the last axis, in any unit of which `spatial_scale`
        makes cells. Coordinates are computed in float32.
      output_size: the number of bins, `(P, Q)` along H and W, or one int for both.
      spatial_scale: cells per unit of the coordinates, for example 1/16. A scalar; it may be
        traced.
      sampling_ratio: the number of samples in a bin along each axis: a positive int, a pair for
        H and W, or None for as many as a bin has cells, rounded up, for each RoI. What is None here
        is -1 in torchvision and 0 in ONNX. With None, an aligned RoI that has no area, or is
        inverted along an axis, pools to 0; with a number, an inverted one is a mirrored one.
      aligned: True if a cell's centre is half a cell after its index, as in detectron2 and newer
        models; False for torchvision's default, which shifts features by half a cell, and takes a
        side of less than a cell, or an inverted one, for one of a whole cell.
      image_index: integer, `[R]`: the index of each RoI's image, for RoIs `[R, 4]`.
      roi_mask: bool, `[K]`, `[N, K]` or `[R]`: True for a real RoI, False for padding.
      implementation: None for the best that the platform has, `"xla"` for plain XLA, `"kernel"` for
        one written by hand, or the name of one. Sums differ in their last bits.
      features_spec: how the features are split over a mesh of automatic axes; see
        `jax_roipool.roi_pool`.

    Returns:
      `[K, P, Q, C]`, `[N, K, P, Q, C]` or `[R, P, Q, C]`, of the features' dtype.

    Raises:
      TypeError: a dtype that cannot be averaged, or that cannot be coordinates, indices or a mask,
        or a sampling ratio that is no int.
      ValueError: shapes that do not go together, an output size or sampling ratio that is not
        positive, a Python or NumPy number for a scale that is not positive and finite, an unknown
        implementation, or one that the platform cannot run.

    The operator is that of He et al., "Mask R-CNN" (https://arxiv.org/abs/1703.06870), section 3,
    and equals `torchvision.ops.roi_align`.

    >>> import jax.numpy as jnp
    >>> from jax_roipool import roi_align
    >>> features = jnp.arange(16.0).reshape(4, 4, 1)
    >>> roi_align(features, jnp.array([[1, 1, 3, 3], [0, 0, 2, 4]]), 2, sampling_ratio=2)[..., 0]
    Array([[[ 5.   ,  6.   ],
            [ 9.   , 10.   ]],
    <BLANKLINE>
           [[ 2.125,  3.   ],
            [10.125, 11.   ]]], dtype=float32)
    """
    return average(
        align_taps,
        features,
        rois,
        output_size,
        spatial_scale,
        image_index=image_index,
        roi_mask=roi_mask,
        implementation=implementation,
        features_spec=features_spec,
        sampling_ratio=check_sampling_ratio(sampling_ratio),
        aligned=_check_aligned(aligned),
    )


def check_sampling_ratio(sampling_ratio: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Samples of a bin along the rows and along the columns, or None for adaptive ones."""
    if sampling_ratio is None:
        return None
    expected = (
        f"sampling_ratio must be an int from 1 to {MAX_SAMPLES}, a pair of them, or None for "
        "samples by the size of a bin (torchvision's -1, and 0 in ONNX)"
    )
    return check_pair("sampling_ratio", sampling_ratio, MAX_SAMPLES, expected)


def _check_aligned(aligned: bool) -> bool:
    if not isinstance(aligned, (bool, np.bool_)):
        raise TypeError(f"aligned must be a bool, got {aligned!r}")
    return bool(aligned)
