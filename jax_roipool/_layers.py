"""The operators as layers: configuration, without parameters. `linen.py` and `nnx.py` make modules.

A layer is stated once, here. The Flax class adds nothing but its own base class and an example.
"""

from __future__ import annotations

import dataclasses

import jax
from jax.typing import ArrayLike

from jax_roipool._bins import Convention
from jax_roipool._roi_pool import roi_pool


@dataclasses.dataclass
class RoIPool:
    """`jax_roipool.roi_pool` as a layer."""

    output_size: int | tuple[int, int]
    spatial_scale: float
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
