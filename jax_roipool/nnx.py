"""Region pooling as Flax NNX modules."""

from __future__ import annotations

from flax import nnx

from jax_roipool import _layers


class RoIPool(_layers.RoIPool, nnx.Module):
    """`jax_roipool.roi_pool` as a `flax.nnx` layer. It has no parameters.

    Args:
      output_size: bins along H and W, `(P, Q)`, or one int for both.
      spatial_scale: cells per unit of the RoI coordinates, for example 1/16. Required: a wrong one
        pools other cells and says nothing.
      convention: how RoIs split into bins, a name or a `jax_roipool.Convention`.
      implementation: None for the best that the platform has, `"xla"` or `"kernel"`.
      features_spec: how the features are split over a mesh of automatic axes, see `roi_pool`.
      forward_mode: whether `jax.jvp`, `linearize` and `jacfwd` are wanted, see `roi_pool`.

    >>> import jax.numpy as jnp
    >>> from jax_roipool.nnx import RoIPool
    >>> layer = RoIPool(output_size=7, spatial_scale=1 / 16)
    >>> rois = jnp.array([[[0, 0, 320, 160]], [[16, 16, 64, 64]]])
    >>> layer(jnp.ones((2, 38, 50, 64)), rois).shape
    (2, 1, 7, 7, 64)
    """
