"""Region pooling as Flax linen modules."""

from __future__ import annotations

from flax import linen as nn

from jax_roipool import _layers


class RoIPool(_layers.RoIPool, nn.Module):
    """`jax_roipool.roi_pool` as a `flax.linen` layer. It has no parameters.

    Attributes:
      output_size: bins along H and W, `(P, Q)`, or one int for both.
      spatial_scale: cells per unit of the RoI coordinates, for example 1/16. Required: a wrong one
        pools other cells and says nothing.
      convention: how RoIs split into bins, a name or a `jax_roipool.Convention`.
      implementation: None for the best that the platform has, `"xla"` or `"kernel"`.
      features_spec: how the features are split over a mesh of automatic axes, see `roi_pool`.
      forward_mode: whether `jax.jvp`, `linearize` and `jacfwd` are wanted, see `roi_pool`.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jax_roipool.linen import RoIPool
    >>> layer = RoIPool(output_size=7, spatial_scale=1 / 16)
    >>> rois = jnp.array([[[0, 0, 320, 160]], [[16, 16, 64, 64]]])
    >>> layer.apply({}, jnp.ones((2, 38, 50, 64)), rois).shape
    (2, 1, 7, 7, 64)
    """
