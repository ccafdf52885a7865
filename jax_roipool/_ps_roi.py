"""Position-sensitive RoI pooling: every bin has channels of its own."""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jax_roipool._averages import average
from jax_roipool._bins import Convention
from jax_roipool._roi_align import check_sampling_ratio
from jax_roipool._taps import align_taps, average_taps

_BINS = Convention(overlapping_bins=True, float32_edges=True)


def ps_roi_align(
    features: ArrayLike,
    rois: ArrayLike,
    output_size: int | tuple[int, int],
    spatial_scale: ArrayLike = 1.0,
    *,
    sampling_ratio: int | tuple[int, int] | None = None,
    image_index: ArrayLike | None = None,
    roi_mask: ArrayLike | None = None,
    implementation: str | None = None,
    features_spec: PartitionSpec | None = None,
) -> jax.Array:
    """`jax_roipool.roi_align`, aligned, in which each of P x Q bins pools channels of its own.

    Channel `c` of bin `(p, q)` pools channel `(c * P + p) * Q + q` of the features.

    Args:
      features: `[H, W, C * P * Q]` or `[N, H, W, C * P * Q]`.

    The other arguments, and errors, are those of `jax_roipool.roi_align`. A `features_spec` cannot
    split channels.

    Returns:
      `[K, P, Q, C]`, `[N, K, P, Q, C]` or `[R, P, Q, C]`, of the features' dtype.

    Raises:
      ValueError: a number of channels that is no multiple of P * Q.

    The operator equals `torchvision.ops.ps_roi_align`, but for RoIs without area and an adaptive
    ratio, where that has NaN and this has 0. The idea is that of Dai et al., "R-FCN"
    (https://arxiv.org/abs/1605.06409).

    >>> import jax.numpy as jnp
    >>> from jax_roipool import ps_roi_align
    >>> features = jnp.broadcast_to(jnp.arange(4.0), (5, 5, 4))
    >>> ps_roi_align(features, jnp.array([[1, 1, 3, 3]]), 2)[0, ..., 0]
    Array([[0., 1.],
           [2., 3.]], dtype=float32)
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
        position_sensitive=True,
        sampling_ratio=check_sampling_ratio(sampling_ratio),
        aligned=True,
    )


def ps_roi_pool(
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
    """Mean of whole cells in P x Q bins of every RoI, each of which pools channels of its own.

    Channel `c` of bin `(p, q)` pools channel `(c * P + p) * Q + q` of the features. Bins are
    torchvision's, in float32, from the first cell of the RoI to before its last; and as there, the
    last row and column of the map are in no bin. The gradient is that of this (torchvision's
    spreads it over the last row and column as well).

    Args:
      features: `[H, W, C * P * Q]` or `[N, H, W, C * P * Q]`.

    The other arguments, and errors, are those of `jax_roipool.roi_average_pool`. A `features_spec`
    cannot split channels.

    Returns:
      `[K, P, Q, C]`, `[N, K, P, Q, C]` or `[R, P, Q, C]`, of the features' dtype.

    Raises:
      ValueError: a number of channels that is no multiple of P * Q.

    The operator is that of Dai et al., "R-FCN" (https://arxiv.org/abs/1605.06409), section 2.2, and
    equals `torchvision.ops.ps_roi_pool`.

    >>> import jax.numpy as jnp
    >>> from jax_roipool import ps_roi_pool
    >>> features = jnp.broadcast_to(jnp.arange(4.0), (5, 5, 4))
    >>> ps_roi_pool(features, jnp.array([[1, 1, 3, 3]]), 2)[0, ..., 0]
    Array([[0., 1.],
           [2., 3.]], dtype=float32)
    """
    return average(
        average_taps,
        features,
        rois,
        output_size,
        spatial_scale,
        image_index=image_index,
        roi_mask=roi_mask,
        implementation=implementation,
        features_spec=features_spec,
        position_sensitive=True,
        convention=_BINS,
        unread=1,
    )
