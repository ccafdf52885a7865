"""The operators as layers: configuration, without parameters. `linen.py` and `nnx.py` make modules.

A layer is stated once, here. The Flax class adds nothing but its own base class and an example.
"""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jax_roipool._bins import Convention
from jax_roipool._roi_pool import roi_pool
from jax_roipool._rois import check_output_size


@dataclasses.dataclass(eq=False)  # linen makes its own comparison, nnx has none
class RoIPool:
    """`jax_roipool.roi_pool` as a layer."""

    output_size: int | tuple[int, int]
    spatial_scale: float
    convention: str | Convention = "partition"
    implementation: str | None = None
    features_spec: PartitionSpec | None = None
    forward_mode: bool = False

    def __post_init__(self):
        self.output_size = check_output_size(self.output_size)  # a tuple, for a list has no hash
        flax_post_init = getattr(super(), "__post_init__", None)
        if flax_post_init is not None:
            flax_post_init()

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
            features_spec=self.features_spec,
            forward_mode=self.forward_mode,
        )
