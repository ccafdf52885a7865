"""RoI pooling as a Flax NNX module."""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import ArrayLike

from jax_roipool._bins import Convention
from jax_roipool._roi_pool import roi_pool


class RoIPool(nnx.Module):
    """`jax_roipool.roi_pool` as a `flax.nnx` layer. It has no parameters.

    Args:
      output_size: bins along H and W, `(P, Q)`, or one int for both.
      spatial_scale: cells per unit of the RoI coordinates, for example 1/16.
      convention: how RoIs split into bins, a name or a `jax_roipool.Convention`.
      implementation: None for the best that the platform has.

    >>> import jax.numpy as jnp
    >>> from jax_roipool.nnx import RoIPool
    >>> layer = RoIPool(output_size=7, spatial_scale=1 / 16)
    >>> rois = jnp.array([[[0, 0, 320, 160]], [[16, 16, 64, 64]]])
    >>> layer(jnp.ones((2, 38, 50, 64)), rois).shape
    (2, 1, 7, 7, 64)
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float = 1.0,
        convention: str | Convention = "partition",
        implementation: str | None = None,
    ):
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.convention = convention
        self.implementation = implementation

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
