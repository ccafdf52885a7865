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


class RoIAlign(_layers.RoIAlign, nn.Module):
    """`jax_roipool.roi_align` as a `flax.linen` layer. It has no parameters.

    Attributes:
      output_size: bins along H and W, `(P, Q)`, or one int for both.
      spatial_scale: cells per unit of the RoI coordinates, for example 1/16. Required: a wrong one
        averages other cells and says nothing.
      sampling_ratio: samples of a bin along each axis, an int, a pair for H and W, or None for as
        many as a bin has cells. torchvision's -1 is None here.
      aligned: whether a cell's centre is half a cell after its index. torchvision's default is
        False.
      implementation: None for the best that the platform has, see `roi_align`.
      features_spec: how the features are split over a mesh of automatic axes, see `roi_pool`.

    >>> import jax.numpy as jnp
    >>> from jax_roipool.linen import RoIAlign
    >>> layer = RoIAlign(output_size=7, spatial_scale=1 / 16, sampling_ratio=2)
    >>> rois = jnp.array([[[0, 0, 320, 160]], [[16, 16, 64, 64]]])
    >>> layer.apply({}, jnp.ones((2, 38, 50, 64)), rois).shape
    (2, 1, 7, 7, 64)
    """


class MultiScaleRoIAlign(_layers.MultiScaleRoIAlign, nn.Module):
    """RoIAlign on a feature pyramid as a `flax.linen` layer, by default with torchvision's numbers.

    `jax_roipool.assign_levels` chooses a level for each RoI, and `jax_roipool.pool_levels` averages
    it there. It has no parameters.

    Attributes:
      output_size: bins along H and W, `(P, Q)`, or one int for both.
      spatial_scales: one for each map, finest first, each half of the one before and a power of
        two, for RoIs in pixels of the image.
      sampling_ratio: samples of a bin along each axis, see `RoIAlign`.
      aligned: whether a cell's centre is half a cell after its index; True for detectron2's
        `ROIAlignV2`.
      canonical_size: in pixels, of RoIs that belong to the canonical level.
      canonical_level: of which the scale is 2**-canonical_level.
      implementation: None for the best that the platform has, see `roi_align`.
      features_spec: how the features are split over a mesh of automatic axes, see `roi_pool`.

    >>> import jax.numpy as jnp
    >>> from jax_roipool.linen import MultiScaleRoIAlign
    >>> layer = MultiScaleRoIAlign(output_size=7, spatial_scales=(1 / 4, 1 / 8))
    >>> features = [jnp.ones((1, 100, 80, 16)), jnp.ones((1, 50, 40, 16))]
    >>> rois = jnp.array([[[0, 0, 320, 160], [16, 16, 64, 64]]])
    >>> layer.apply({}, features, rois).shape
    (1, 2, 7, 7, 16)
    """
