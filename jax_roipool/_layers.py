"""The operators as layers: configuration, without parameters. `linen.py` and `nnx.py` make modules.

A layer is stated once, here. The Flax class adds nothing but its own base class and an example.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jax_roipool._bins import Convention
from jax_roipool._levels import assign_levels, pool_levels
from jax_roipool._roi_align import check_sampling_ratio, roi_align
from jax_roipool._roi_pool import roi_pool
from jax_roipool._rois import check_output_size


class _Layer:
    """A checked output size and sampling ratio, and tuples for lists, which have no hash."""

    def __post_init__(self):
        self.output_size = check_output_size(self.output_size)
        check_sampling_ratio(getattr(self, "sampling_ratio", None))
        for name in ("spatial_scales", "sampling_ratio"):
            if isinstance(getattr(self, name, None), list):
                setattr(self, name, tuple(getattr(self, name)))
        flax_post_init = getattr(super(), "__post_init__", None)
        if flax_post_init is not None:
            flax_post_init()


@dataclasses.dataclass(eq=False)  # linen makes its own comparison, nnx has none
class RoIPool(_Layer):
    """`jax_roipool.roi_pool` as a layer."""

    output_size: int | tuple[int, int]
    spatial_scale: float
    convention: str | Convention = "partition"
    implementation: str | None = None
    features_spec: PartitionSpec | None = None
    forward_mode: bool = False

    def __call__(
        self,
        features: ArrayLike,
        rois: ArrayLike,
        roi_mask: ArrayLike | None = None,
        *,
        image_index: ArrayLike | None = None,
    ) -> jax.Array:
        """Pools `features` over `rois`; shapes and errors are those of `jax_roipool.roi_pool`."""
        return roi_pool(
            features,
            rois,
            self.output_size,
            spatial_scale=self.spatial_scale,
            image_index=image_index,
            roi_mask=roi_mask,
            convention=self.convention,
            implementation=self.implementation,
            features_spec=self.features_spec,
            forward_mode=self.forward_mode,
        )


@dataclasses.dataclass(eq=False)
class RoIAlign(_Layer):
    """`jax_roipool.roi_align` as a layer."""

    output_size: int | tuple[int, int]
    spatial_scale: float
    sampling_ratio: int | tuple[int, int] | None = None
    aligned: bool = True
    implementation: str | None = None
    features_spec: PartitionSpec | None = None

    def __call__(
        self,
        features: ArrayLike,
        rois: ArrayLike,
        roi_mask: ArrayLike | None = None,
        *,
        image_index: ArrayLike | None = None,
    ) -> jax.Array:
        """Averages `features` over `rois`; shapes, errors: those of `jax_roipool.roi_align`."""
        return roi_align(
            features,
            rois,
            self.output_size,
            spatial_scale=self.spatial_scale,
            sampling_ratio=self.sampling_ratio,
            aligned=self.aligned,
            image_index=image_index,
            roi_mask=roi_mask,
            implementation=self.implementation,
            features_spec=self.features_spec,
        )


@dataclasses.dataclass(eq=False)
class MultiScaleRoIAlign(_Layer):
    """`jax_roipool.roi_align` on the levels of a pyramid, as a layer."""

    output_size: int | tuple[int, int]
    spatial_scales: Sequence[float]
    sampling_ratio: int | tuple[int, int] | None = 2
    aligned: bool = False
    canonical_size: float = 224
    canonical_level: int = 4
    implementation: str | None = None
    features_spec: PartitionSpec | None = None

    def __call__(
        self,
        features: Sequence[ArrayLike],
        rois: ArrayLike,
        roi_mask: ArrayLike | None = None,
        *,
        image_index: ArrayLike | None = None,
    ) -> jax.Array:
        """Averages each RoI from its own map of `features`, which are those of the scales in turn.

        Shapes and errors are those of `jax_roipool.pool_levels` with `jax_roipool.roi_align`.
        """
        pool = functools.partial(
            roi_align,
            output_size=self.output_size,
            sampling_ratio=self.sampling_ratio,
            aligned=self.aligned,
            image_index=image_index,
            implementation=self.implementation,
            features_spec=self.features_spec,
        )
        levels = assign_levels(
            rois,
            self.spatial_scales,
            canonical_size=self.canonical_size,
            canonical_level=self.canonical_level,
        )
        return pool_levels(
            pool,
            features,
            rois,
            spatial_scales=self.spatial_scales,
            levels=levels,
            roi_mask=roi_mask,
        )
