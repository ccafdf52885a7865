"""RoI average pooling: from features and RoIs to bins' means."""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jax_roipool._averages import average
from jax_roipool._bins import Convention, as_convention
from jax_roipool._taps import average_taps


def roi_average_pool(
    features: ArrayLike,
    rois: ArrayLike,
    output_size: int | tuple[int, int],
    spatial_scale: ArrayLike = 1.0,
    *,
    image_index: ArrayLike | None = None,
    roi_mask: ArrayLike | None = None,
    convention: str | Convention = "partition",
    implementation: str | None = None,
    features_spec: PartitionSpec | None = None,
) -> jax.Array:
    """Mean of the features in each of P x Q bins of every region of interest (RoI).

    The bins are those of `jax_roipool.roi_pool`: whole cells, by the same conventions. A bin pools
    to the mean of its cells inside the map, and to 0 if it has none, whatever the convention's
    `empty_value`. A cell's gradient is the sum over the bins it is in, of each bin's divided by its
    number of cells. RoIs have no gradient.

    A RoI that `roi_mask` excludes, one with a coordinate that is not finite, and one whose image
    index names no image pool to 0 and pass no gradient. So do all if a traced `spatial_scale` is
    not finite.

    Args:
      features: `[H, W, C]` or `[N, H, W, C]`, floating, of 16 bits or more. Sums are float32, or
        float64 if the features are.
      rois: as in `jax_roipool.roi_pool`.
      output_size: the number of bins, `(P, Q)` along H and W, or one int for both.
      spatial_scale: cells per unit of the coordinates. A scalar; it may be traced.
      image_index: integer, `[R]`: the index of each RoI's image, for RoIs `[R, 4]`.
      roi_mask: bool, `[K]`, `[N, K]` or `[R]`: True for a real RoI, False for padding.
      convention: as in `jax_roipool.roi_pool`.
      implementation: as in `jax_roipool.roi_align`.
      features_spec: as in `jax_roipool.roi_pool`.

    Returns:
      `[K, P, Q, C]`, `[N, K, P, Q, C]` or `[R, P, Q, C]`, of the features' dtype.

    Raises:
      TypeError: a dtype that cannot be averaged, or that cannot be coordinates, indices or a mask.
      ValueError: as in `jax_roipool.roi_pool`.

    With `convention="chainer"` it equals `chainer.functions.roi_average_pooling_2d`.

    >>> import jax.numpy as jnp
    >>> from jax_roipool import roi_average_pool
    >>> features = jnp.arange(16.0).reshape(4, 4, 1)
    >>> roi_average_pool(features, jnp.array([[0, 0, 4, 4], [1, 1, 3, 4]]), 2)[..., 0]
    Array([[[ 2.5,  4.5],
            [10.5, 12.5]],
    <BLANKLINE>
           [[ 5. ,  6. ],
            [11. , 12. ]]], dtype=float32)
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
        convention=as_convention(convention),
    )
