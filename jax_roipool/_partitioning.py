"""How XLA splits the primitives over the devices of a mesh.

Groups, RoIs and channels are pooled independently: a device that has its part of them needs no
other's, and only the gradient is summed over the devices that share the RoIs.

Where the images of a group are split (flat RoIs on a split batch), a RoI can be on one device and
its image on another. Then either the features move, or the bins do: each device pools all RoIs that
are in its own images, and the bins are brought to where their RoIs are. That is decided by what is
smaller.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import ClosedJaxpr
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

RECTANGLES = ("gk", "gkp", "gkp", "gkq", "gkq")
MAPS, BINS = "gnhwc", "gkpqc"


def needs_devices(features: NamedSharding) -> ClosedJaxpr | None:
    """A parameter for primitives, with which JAX has the devices at hand when it lowers them.

    It has for every program in which there is a `custom_partitioning`, be it in the parameter of a
    primitive. It then refuses an `AbstractMesh`, and several meshes, so this is None wherever it
    would be of no use, as where the features' type says how they are sharded.
    """
    shardy = jax.config.jax_use_shardy_partitioner  # pyright: ignore[reportAttributeAccessIssue]
    if jax.__version_info__ < (0, 8) or not shardy or _is_explicit(features.mesh):
        return None
    # TPUs have no custom_partitioning: https://github.com/jax-ml/jax/issues/38196
    if jax.device_count() == 1 or jax.default_backend() == "tpu":
        return None
    return _one_custom_partitioning()


@functools.cache
def _one_custom_partitioning() -> ClosedJaxpr:
    call = custom_partitioning(lambda x: x)
    call.def_partition(lambda mesh, operands, results: None, sharding_rule="i -> i")
    return jax.make_jaxpr(call)(jax.ShapeDtypeStruct((1,), jnp.int32))


def is_partitioned(context: mlir.LoweringRuleContext) -> bool:
    """Whether XLA splits the program over devices by itself, as it does not under shard_map."""
    axis_context = context.module_context.axis_context
    if isinstance(axis_context, mlir.ShardingContext):
        return axis_context.num_devices > 1
    if isinstance(axis_context, mlir.SPMDAxisContext):
        return axis_context.manual_axes != frozenset(axis_context.mesh.axis_names)
    return False


def in_auto_mode(function: Callable, context: mlir.LoweringRuleContext) -> Callable:
    """`function` for operands of explicit shardings, its results sharded as their types say."""
    mesh = _explicit_mesh(context)
    if mesh is None or not hasattr(jax.sharding, "auto_axes"):  # before JAX 0.7
        return function
    specs = [result.sharding.spec for result in context.avals_out]  # pyright: ignore

    def call(*operands):
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.sharding.auto_axes(function, axes=_explicit_axes(mesh), out_sharding=specs)(
                *operands
            )

    return call


def _explicit_mesh(context: mlir.LoweringRuleContext) -> AbstractMesh | None:
    """The mesh of the operands' and results' types, if it has explicit axes."""
    types = (*context.avals_in, *context.avals_out)
    meshes = (x.sharding.mesh for x in types)  # pyright: ignore[reportAttributeAccessIssue]
    return next((mesh for mesh in meshes if _explicit_axes(mesh)), None)


def _explicit_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    by_name = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in by_name if kind == AxisType.Explicit)


def _is_explicit(mesh: Mesh | AbstractMesh) -> bool:
    """Whether all axes are, so that types say all there is to say."""
    return not mesh.empty and _explicit_axes(mesh) == mesh.axis_names


class Call(NamedTuple):
    """What each device is to call with its part, and the axes of every array.

    Those are `MAPS` of features and their gradient, `BINS` of what is pooled and of argmaxes, and
    those of `RECTANGLES`. The results are a list.
    """

    function: Callable  # of operands and the keyword images, n
    operands: Sequence[str]
    results: Sequence[str]
    images: int

    def on_each_device(
        self, context: mlir.LoweringRuleContext, has_devices: bool
    ) -> Callable | None:
        """The whole call, split over the devices; None where XLA cannot be told how."""
        mesh = _explicit_mesh(context)
        if mesh is not None and _is_explicit(mesh):
            return self._by_types(mesh, context.avals_in, context.avals_out)
        axis_context = context.module_context.axis_context
        if (
            has_devices
            and isinstance(axis_context, mlir.ShardingContext)
            and axis_context.device_assignment is not None
            and axis_context.abstract_mesh is not None
            and not context.module_context.lowering_parameters.for_export
            and "tpu" not in context.module_context.platforms
        ):
            return in_auto_mode(self._by_propagation(), context)
        return None

    def _by_types(self, mesh: Mesh | AbstractMesh, operand_types, result_types) -> Callable:
        plan = self._plan(mesh, operand_types, result_types)
        on_one_device = jax.shard_map(
            plan.on_one_device,
            mesh=mesh,
            in_specs=plan.in_specs,
            out_specs=plan.out_specs,
            check_vma=False,
        )

        def call(*operands):
            results = on_one_device(*map(reshard, operands, plan.in_specs))
            return [
                reshard(x, result_type.sharding.spec)
                for x, result_type in zip(results, result_types, strict=True)
            ]

        def reshard(x, spec):
            return jax.sharding.reshard(x, NamedSharding(mesh, spec))

        return call

    def _by_propagation(self) -> Callable:
        def partition(mesh, operand_types, result_types):
            plan = self._plan(mesh, operand_types, result_types)
            in_shardings, out_shardings = (
                [NamedSharding(mesh, spec) for spec in specs]
                for specs in (plan.in_specs, plan.out_specs)
            )
            return mesh, plan.on_one_device, out_shardings, tuple(in_shardings)

        axes = dict.fromkeys("".join((*self.operands, *self.results)))
        call = custom_partitioning(lambda *parts: self.function(*parts, images=self.images))
        call.def_partition(
            partition,
            sharding_rule=" -> ".join(
                ", ".join(" ".join(array) for array in arrays)
                for arrays in (self.operands, self.results)
            ),
            reduction_factors=("k",) if MAPS in self.results else ("n",),
            need_replication_factors=tuple(axis for axis in axes if axis in "hwpq"),
        )
        return call

    def _plan(self, mesh: Mesh | AbstractMesh, operand_types, result_types) -> _Plan:
        """How the call is split, by how its arrays are."""
        arrays = list(
            zip((*self.operands, *self.results), (*operand_types, *result_types), strict=True)
        )
        scatters = MAPS in self.results
        g = _mesh_axes("g", arrays, mesh, taken=())
        c = _mesh_axes("c", arrays, mesh, taken=g)
        k, n = (_mesh_axes(axis, arrays, mesh, taken=g + c) for axis in "kn")
        together = k == n
        bins, maps = (_num_bytes(axes, arrays) for axes in (BINS, MAPS))
        # Gathered, or their sums scattered; not moved at all; summed.
        bins_moved = bins if together else 0 if scatters else 2 * bins
        # With k and n over some of the same devices, sums over n's would mix RoIs.
        own_images = n != () and bins_moved < maps and (together or not set(k) & set(n))
        k_of_operands = () if own_images and together else k
        n_of_maps = n if own_images or (scatters and together) else ()
        summed = k_of_operands if scatters else n_of_maps

        def on_one_device(*parts):
            images = self.images
            if own_images:
                images //= math.prod(mesh.shape[name] for name in n)
                parts = _of_own_images(self.operands, parts, n, images)
            first, *others = parts
            if scatters and summed:  # unlike a sum of bins, which has one that is not zero
                first = first.astype(jnp.promote_types(first.dtype, jnp.float32))
            result, *argmax = self.function(first, *others, images=images)
            if summed:
                result = _sum(result, summed, together).astype(parts[0].dtype)
                argmax = [_sum(x + 1, summed, together).astype(x.dtype) - 1 for x in argmax]
            return [result, *argmax]

        def specs(arrays, k):
            split = {"g": g, "c": c, "k": k, "n": n_of_maps}
            return [PartitionSpec(*(split.get(axis) or None for axis in array)) for array in arrays]

        return _Plan(
            on_one_device, tuple(specs(self.operands, k_of_operands)), specs(self.results, k)
        )


class _Plan(NamedTuple):
    on_one_device: Callable
    in_specs: tuple[PartitionSpec, ...]
    out_specs: list[PartitionSpec]


def _mesh_axes(axis: str, arrays, mesh, taken: tuple[str, ...]) -> tuple[str, ...]:
    """What the axis is split over, evenly, in the first array in which it is."""
    for array, array_type in arrays:
        if axis in array:
            at = array.index(axis)
            names = (*array_type.sharding.spec, *[None] * len(array))[at]
            names = (names,) if isinstance(names, str) else tuple(names or ())
            even = array_type.shape[at] % math.prod(mesh.shape[name] for name in names) == 0
            if names and even and not set(names) & set(taken):
                return names
    return ()


def _num_bytes(axes: str, arrays) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for array, x in arrays if array == axes)


def _of_own_images(operands, parts, names, images):
    """Image indices from this device's first image on, and no argmax in images of other devices."""
    parts = list(parts)
    at = operands.index("gk")
    index = parts[at] - images * lax.axis_index(names)
    elsewhere = (index < 0) | (index >= images)
    parts[at] = jnp.where(elsewhere, -1, index)
    if operands[1] == BINS:
        parts[1] = jnp.where(elsewhere[:, :, None, None, None], -1, parts[1])
    return parts


def _sum(x: jax.Array, names: tuple[str, ...], scattered: bool) -> jax.Array:
    """The sum over devices, each with all of it or with its part of the second axis."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        x = x.astype(jnp.promote_types(x.dtype, jnp.int32))  # not every platform adds smaller ones
    if scattered:
        return lax.psum_scatter(x, names, scatter_dimension=1, tiled=True)
    return lax.psum(x, names)
