"""A call in explicit mode inside a program whose mesh has automatic axes.

There the types say how arrays are split, so that each device can be given its part for a kernel
that XLA could not split by itself (`_partitioning.shard_map_of`).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jax_roipool._partitioning import axes_of


def call_in_explicit_mode(function: Callable, features_spec: PartitionSpec, *arguments):
    """`function(features, rois, ...)` with features that are split that way.

    What else has axes, or is None, has an entry for each RoI, and is split as the batch is.
    """
    features, rois, *_ = arguments
    spec = _checked_spec(features_spec, features)
    mesh = _mesh_of(features, rois)
    unknown = {*jax.tree.leaves(tuple(spec))} - {*mesh.axis_names}
    if unknown:
        there_are = f"that of the arrays has {mesh.axis_names}"
        if mesh.empty:
            there_are = "the arrays are on none: shard them, or call under jax.set_mesh"
        raise ValueError(
            f"features_spec must name axes of a mesh, got {features_spec}; {there_are}"
        )
    automatic = axes_of(AxisType.Auto, mesh)
    if not automatic:
        return function(*arguments)
    batch = spec[0] if features.ndim == 4 else None
    specs = [PartitionSpec(batch) if np.ndim(x) else PartitionSpec() for x in arguments[1:]]
    with jax.sharding.use_abstract_mesh(mesh):
        explicit = jax.sharding.explicit_axes(function, axes=automatic, in_sharding=(spec, *specs))
        return explicit(*arguments)


def _checked_spec(spec: PartitionSpec, features: jax.Array) -> PartitionSpec:
    """One entry an axis of the features; H and W are whole."""
    if not isinstance(spec, PartitionSpec):
        raise TypeError(f"features_spec must be a jax.sharding.PartitionSpec, got {spec!r}")
    full = PartitionSpec(*spec, *[None] * (features.ndim - len(spec)))
    if len(full) != features.ndim or any(full[-3:-1]):
        raise ValueError(
            f"features_spec must split no axes but the batch and the channels of features "
            f"{list(features.shape)}, got {spec}"
        )
    return full


def _mesh_of(*arrays: jax.Array) -> AbstractMesh:
    """The mesh that the arrays are on, or else the one that is set."""
    meshes = (jax.typeof(x).sharding.mesh for x in arrays)
    return next((mesh for mesh in meshes if not mesh.empty), jax.sharding.get_abstract_mesh())
