"""RoI pooling as a Flax linen module."""

from __future__ import annotations

import jax
from flax import linen as nn
from jax.typing import ArrayLike

from jax_roipool._bins import Convention
from jax_roipool._roi_pool import roi_pool


class RoIPool(nn.Module):
    """`jax_roipool.roi_pool` as a `flax.linen` layer. It has no parameters.

    Attributes:
      output_size: bins along H and W, `(P, Q)`, or one int for both.
      spatial_scale: cells per unit of the RoI coordinates, for example 1/16.
      convention: how RoIs split into bins, a name or a `jax_roipool.Convention`.
      implementation: None for the best that the platform has.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jax_roipool.linen import RoIPool
    >>> layer = RoIPool(output_size=7, spatial_scale=1 / 16)
    >>> rois = jnp.array([[[0, 0, 320, 160]], [[16, 16, 64, 64]]])
    >>> layer.apply({}, jnp.ones((2, 38, 50, 64)), rois).shape
    (2, 1, 7, 7, 64)
    """

    output_size: int | tuple[int, int]
    spatial_scale: float = 1.0
    convention: str | Convention = "partition"
    implementation: str | None = None

    def __call__(
        self, features: ArrayLike, rois: ArrayLike, roi_mask: ArrayLike | None = None
    ) -> jax.Array:
        """Pools `features` over `rois`; shapes and errors are those of `jax_roipool.roi_pool`."""
        return roi_pool(
            features,
            rois,
            self.output_size,
            spatial_scale=self.spatial_scale,
            roi_mask=roi_mask,
            convention=self.convention,
            implementation=self.implementation,
        )
