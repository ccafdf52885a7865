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

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import ClosedJaxpr
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

RECTANGLES = ("gk", "gkp", "gkp", "gkq", "gkq")
MAPS, BINS = "gnhwc", "gkpqc"


def needs_devices() -> ClosedJaxpr | None:
    """A parameter for primitives, with which JAX has the devices at hand when it lowers them.

    It has for every program in which there is a `custom_partitioning`, be it in the parameter of a
    primitive. It then refuses an `AbstractMesh`, and several meshes, so this is None wherever it
    would be of no use.
    """
    shardy = jax.config.jax_use_shardy_partitioner  # pyright: ignore[reportAttributeAccessIssue]
    if jax.__version_info__ < (0, 8) or not shardy:
        return None
    # On TPUs it does not work: https://github.com/jax-ml/jax/issues/38196
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


def can_be_told_how(context: mlir.LoweringRuleContext) -> bool:
    """Whether XLA can be told, in a partitioned program, how a call is split."""
    axis_context = context.module_context.axis_context
    return (
        isinstance(axis_context, mlir.ShardingContext)
        and axis_context.device_assignment is not None
        and axis_context.abstract_mesh is not None
        and not context.module_context.lowering_parameters.for_export
    )


def in_auto_mode(function: Callable, context: mlir.LoweringRuleContext) -> Callable:
    """`function` for operands of explicit shardings, its results sharded as their types say."""
    shardings = [x.sharding for x in (*context.avals_in, *context.avals_out)]  # pyright: ignore
    mesh = next((x.mesh for x in shardings if AxisType.Explicit in x.mesh.axis_types), None)
    if mesh is None:
        return function
    by_name = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in by_name if kind == AxisType.Explicit)
    specs = [sharding.spec for sharding in shardings[len(context.avals_in) :]]

    def call(*operands):
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.sharding.auto_axes(function, axes=explicit, out_sharding=specs)(*operands)

    return call


def on_each_device(
    function: Callable, operands: Sequence[str], results: Sequence[str], all_images: int
) -> Callable:
    """Calls `function(*parts, images=n)` on each device, with its part, and puts results together.

    `operands` and `results` name the axes of every array: `MAPS` of features and their gradient,
    `BINS` of what is pooled and of argmaxes, and those of `RECTANGLES`. The results are a list.
    """
    arrays = (*operands, *results)
    scatters = MAPS in results

    def partition(mesh, operand_types, result_types):
        types = (*operand_types, *result_types)
        split = functools.partial(_mesh_axes, list(zip(arrays, types, strict=True)))
        g = split("g", ())
        c = split("c", g)
        k, n = split("k", (*g, *c)), split("n", (*g, *c))
        bins, maps = (_num_bytes(axes, arrays, types) for axes in (BINS, MAPS))
        together = k == n
        # Gathered, or sums of them scattered; not at all; or whole sums.
        bins_moved = bins if together else 0 if scatters else 2 * bins
        own_images = bool(n) and bins_moved < maps
        k_of_operands = () if own_images and together else k
        n_of_maps = n if own_images or (scatters and together) else ()
        summed = k_of_operands if scatters else n_of_maps

        def sharding(array, k):
            by_axis = {"g": g, "c": c, "k": k, "n": n_of_maps}
            spec = PartitionSpec(*(by_axis.get(axis) or None for axis in array))
            return NamedSharding(mesh, spec)

        def on_one_device(*parts):
            images = all_images
            if own_images:
                images //= math.prod(mesh.shape[name] for name in n)
                parts = _of_own_images(operands, parts, n, images)
            first, *others = parts
            if scatters and summed:  # sums of many, unlike those of bins, of which one is not 0
                first = first.astype(jnp.promote_types(first.dtype, jnp.float32))
            result, *argmax = function(first, *others, images=images)
            if summed:
                result = _sum(result, summed, together).astype(parts[0].dtype)
                argmax = [_sum(x + 1, summed, together).astype(x.dtype) - 1 for x in argmax]
            return [result, *argmax]

        return (
            mesh,
            on_one_device,
            [sharding(array, k) for array in results],
            tuple(sharding(array, k_of_operands) for array in operands),
        )

    axes = dict.fromkeys("".join(arrays))
    call = custom_partitioning(lambda *parts: function(*parts, images=all_images))
    call.def_partition(
        partition,
        sharding_rule=f"{_spaced(operands)} -> {_spaced(results)}",
        reduction_factors=("k",) if scatters else ("n",),
        need_replication_factors=tuple(axis for axis in axes if axis in "hwpq"),
    )
    return call


def _spaced(arrays: Sequence[str]) -> str:
    return ", ".join(" ".join(array) for array in arrays)


def _mesh_axes(arrays_and_types, axis: str, taken: tuple[str, ...]) -> tuple[str, ...]:
    """What the axis is split over in the first array in which it is, but by none that is taken."""
    for array, array_type in arrays_and_types:
        if axis in array:
            names = array_type.sharding.spec[array.index(axis)]
            names = (names,) if isinstance(names, str) else tuple(names or ())
            if names and not set(names) & set(taken):
                return names
    return ()


def _num_bytes(axes: str, arrays: Sequence[str], types) -> int:
    return sum(
        math.prod(t.shape) * t.dtype.itemsize
        for array, t in zip(arrays, types, strict=True)
        if array == axes
    )


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
