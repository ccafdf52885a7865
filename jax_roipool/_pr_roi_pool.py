"""Precise RoI pooling: from features and RoIs to bins' means of the bilinear surface."""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jax_roipool._averages import average
from jax_roipool._taps import pr_taps


def pr_roi_pool(
    features: ArrayLike,
    rois: ArrayLike,
    output_size: int | tuple[int, int],
    spatial_scale: ArrayLike = 1.0,
    *,
    image_index: ArrayLike | None = None,
    roi_mask: ArrayLike | None = None,
    implementation: str | None = None,
    features_spec: PartitionSpec | None = None,
) -> jax.Array:
    """Mean of the bilinear surface over each of P x Q bins of every region of interest (RoI).

    The surface goes through the features, each at its index, and falls to 0 within a cell of the
    map's border. A RoI's coordinates, times `spatial_scale`, give a rectangle, which is split into
    P x Q equal bins; a bin pools to the integral over it, divided by its area. Nothing is rounded
    and nothing sampled, so the result is continuous in the RoIs, and these have a gradient, as the
    features have. A RoI without area, and an inverted one, pool to 0.

    A RoI that `roi_mask` excludes, one with a coordinate that is not finite, and one whose image
    index names no image pool to 0 and pass no gradient. So do all if a traced `spatial_scale` is
    not finite. The scale has no gradient.

    Args:
      features: `[H, W, C]` or `[N, H, W, C]`, floating, of 16 bits or more. Sums are float32, or
        float64 if the features are.
      rois: as in `jax_roipool.roi_pool`. Coordinates are computed in float32.
      output_size: the number of bins, `(P, Q)` along H and W, or one int for both.
      spatial_scale: cells per unit of the coordinates. A scalar; it may be traced.
      image_index: integer, `[R]`: the index of each RoI's image, for RoIs `[R, 4]`.
      roi_mask: bool, `[K]`, `[N, K]` or `[R]`: True for a real RoI, False for padding.
      implementation: as in `jax_roipool.roi_align`.
      features_spec: as in `jax_roipool.roi_pool`.

    Returns:
      `[K, P, Q, C]`, `[N, K, P, Q, C]` or `[R, P, Q, C]`, of the features' dtype.

    Raises:
      TypeError: a dtype that cannot be averaged, or that cannot be coordinates, indices or a mask.
      ValueError: as in `jax_roipool.roi_align`.

    The operator is that of Jiang et al., "Acquisition of Localization Confidence for Accurate
    Object Detection" (https://arxiv.org/abs/1807.11590), section 3.3.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jax_roipool import pr_roi_pool
    >>> features = jnp.arange(16.0).reshape(4, 4, 1)
    >>> pool = lambda roi: pr_roi_pool(features, roi[None], 1)[0, 0, 0, 0]
    >>> pool(jnp.array([1.0, 1.0, 2.0, 3.0]))
    Array(9.5, dtype=float32)
    >>> jax.grad(pool)(jnp.array([1.0, 1.0, 2.0, 3.0]))
    Array([0.5, 2. , 0.5, 2. ], dtype=float32)
    """
    return average(
        pr_taps,
        features,
        rois,
        output_size,
        spatial_scale,
        image_index=image_index,
        roi_mask=roi_mask,
        implementation=implementation,
        features_spec=features_spec,
        rois_have_gradient=True,
    )
