"""How a primitive's arrays are split over the devices of a mesh, and what each device then does.

Every axis of an array has a letter with one meaning throughout: g groups, n images of a group, k
RoIs, c channels; the rest is never split. Groups, RoIs and channels are independent: a device that
has its part of them needs no other's. Where a result has no k or no c, it is a sum over RoIs or
channels, and devices that have different ones add up their parts.

Where the images of a group are split (flat RoIs on a split batch), a RoI can be on one device and
its image on another. Then either the maps move or the bins do; `plan` decides, by what is smaller.
The plan is made of shapes and shardings alone; `shard_map_of` and `custom_partitioning_of` turn it
into a function for the program.
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


class Axes(NamedTuple):
    """The letters of the axes of a primitive's operands and results, one string an array."""

    operands: tuple[str, ...]
    results: tuple[str, ...]
    packed_index: int | None  # the operand whose last axis starts with the RoI's image index

    @property
    def sums_rois(self) -> bool:
        """Whether results are sums over RoIs."""
        return "k" not in self.results[0]


class Plan(NamedTuple):
    """What each device has, and what becomes of its results."""

    in_specs: tuple[PartitionSpec, ...]
    out_specs: tuple[PartitionSpec, ...]
    images: int  # n, of a group on one device
    images_over: tuple[str, ...]  # mesh axes over which a device has its own images alone
    summed_over: tuple[str, ...]  # mesh axes over which the devices' results are added up
    summed_onto: str | None  # the axis along which each device keeps its part of the sum
    channels_over: tuple[str, ...]  # mesh axes over which results that sum channels are added up


def plan(axes: Axes, types: Sequence, mesh: Mesh | AbstractMesh) -> Plan:
    """How a call is split, by how the arrays of its operands and results are.

    Where RoIs are split over the mesh axes k, and images over n:

    |                | a device takes      | results with RoIs | results that sum RoIs   |
    |----------------|---------------------|-------------------|-------------------------|
    | images stay,   | its RoIs, those in  | summed over n     | summed over k           |
    | k and n apart  | its images          |                   |                         |
    | images stay,   | all RoIs that are   | summed over n, to | complete                |
    | k is n         | in its images       | where RoIs are    |                         |
    | maps are       | its RoIs            | complete          | summed over k, to where |
    | gathered       |                     |                   | images are if k is n    |
    """
    arrays = list(zip((*axes.operands, *axes.results), types, strict=True))
    g, c, k, n = mesh_axes(arrays).values()
    together = n != () and k == n
    images_stay = _images_stay(axes, arrays, k, n)
    if images_stay:
        k_of_operands, n_of_maps = () if together else k, n
        summed = k_of_operands if axes.sums_rois else n
        onto = "k" if together and not axes.sums_rois else None
    else:
        onto = "n" if together and axes.sums_rois else None
        k_of_operands, n_of_maps = k, n if onto else ()
        summed = k if axes.sums_rois else ()

    images_over = n if images_stay else ()
    images = next((x.shape[array.index("n")] for array, x in arrays if "n" in array), 1)

    def specs(arrays, k):
        split = {"g": g, "c": c, "k": k, "n": n_of_maps}
        return tuple(
            PartitionSpec(*(split.get(axis) or None for axis in array)) for array in arrays
        )

    return Plan(
        specs(axes.operands, k_of_operands),
        specs(axes.results, k),
        images // math.prod(mesh.shape[name] for name in images_over),
        images_over,
        summed,
        onto,
        () if "c" in axes.results[0] else c,
    )


def _images_stay(axes: Axes, arrays, k: tuple[str, ...], n: tuple[str, ...]) -> bool:
    """Whether a device pools what lies in its own images; else it gets all of them."""
    if n == () or axes.packed_index is None:
        return False
    if k != n and set(k) & set(n):
        return False  # a sum over n would mix RoIs
    bins, maps = (
        sum(math.prod(x.shape) * x.dtype.itemsize for array, x in arrays if {axis, "c"} < {*array})
        for axis in "kn"
    )
    # Bins are gathered, or their sums spread; not moved at all; or summed.
    bins_moved = bins if k == n else 0 if axes.sums_rois else 2 * bins
    return bins_moved < maps


def mesh_axes(arrays) -> dict[str, tuple[str, ...]]:
    """The mesh axes that each axis is split over; `arrays` are pairs of letters and a type.

    Where arrays disagree, the first one that is split says how. A mesh axis splits one axis of an
    array, groups and channels first; RoIs and images may be split over the same one.
    """
    g = _split_over("g", arrays, taken=())
    c = _split_over("c", arrays, taken=g)
    k, n = (_split_over(axis, arrays, taken=g + c) for axis in "kn")
    return {"g": g, "c": c, "k": k, "n": n}


def _split_over(axis: str, arrays, taken: tuple[str, ...]) -> tuple[str, ...]:
    """The mesh axes, none of them taken, that an axis is split over evenly."""
    for array, array_type in arrays:
        if axis in array:
            at = array.index(axis)
            names = (*array_type.sharding.spec, *[None] * len(array))[at]
            names = (names,) if isinstance(names, str) else tuple(names or ())
            parts = math.prod(array_type.sharding.mesh.shape[name] for name in names)
            if names and array_type.shape[at] % parts == 0 and not set(names) & set(taken):
                return names
    return ()


def on_one_device(plan: Plan, axes: Axes, absent: Sequence[int], function: Callable) -> Callable:
    """What each device calls with its parts: `function`, and the sums that the plan asks for.

    Args:
      absent: what each result that `function` can have says of a RoI without an image.
      function: of the parts and the keyword `images`, those of a group on this device; a list.
    """

    def call(*parts):
        first, *others = parts
        dtype = first.dtype
        if axes.sums_rois and plan.summed_over:
            first = first.astype(jnp.promote_types(dtype, jnp.float32))
        parts = [first, *others]
        at = axes.packed_index
        if plan.images_over and at is not None:
            parts[at] = _count_from_own_images(parts[at], plan.images_over, plan.images)
        results = function(*parts, images=plan.images)
        if plan.channels_over:
            results = [_sum(x, plan.channels_over, None) for x in results]
        if not plan.summed_over:
            return results
        onto = None if plan.summed_onto is None else axes.results[0].index(plan.summed_onto)
        # Of the devices that pool a RoI one has its image; the others have what `absent` says.
        sums = [
            _sum(x - none, plan.summed_over, onto) + none
            if none
            else _sum(x, plan.summed_over, onto)
            for x, none in zip(results, absent, strict=False)
        ]
        return [sums[0].astype(dtype), *sums[1:]] if axes.sums_rois else sums

    return call


def _count_from_own_images(packed: jax.Array, names: tuple[str, ...], images: int) -> jax.Array:
    """`packed`, `[G, K, ...]`, with image indices that count from this device's first image on."""
    own = packed - images * lax.axis_index(names)
    own = jnp.where((own >= 0) & (own < images), own, -1)
    lane = lax.broadcasted_iota(jnp.int32, packed.shape, packed.ndim - 1)
    return jnp.where(lane == 0, own, packed)


def _sum(x: jax.Array, names: tuple[str, ...], onto: int | None) -> jax.Array:
    """The sum over devices: all of it on each of them, or its part along the axis `onto`."""
    dtype = x.dtype
    if jnp.issubdtype(dtype, jnp.integer):
        x = x.astype(jnp.promote_types(dtype, jnp.int32))  # not every platform adds smaller ones
    if onto is None:
        return lax.psum(x, names).astype(dtype)
    return lax.psum_scatter(x, names, scatter_dimension=onto, tiled=True).astype(dtype)


def choose(own: jax.Array, these: jax.Array, others: jax.Array) -> jax.Array:
    """`these` where `own`, which has their first axes, and else `others`; split as `these` are."""
    # Not a sum, where one of both is 0: on CPUs that makes zeros of subnormal numbers.
    sharding = jax.typeof(these).sharding
    if any(sharding.spec):
        spec = PartitionSpec(*sharding.spec[: own.ndim])
        own = jax.sharding.reshard(own, NamedSharding(sharding.mesh, spec))
        others = jax.sharding.reshard(others, sharding)
    return jnp.where(jnp.expand_dims(own, tuple(range(own.ndim, these.ndim))), these, others)


# The plan as a part of the program, in the two ways that JAX has.


def is_partitioned(context: mlir.LoweringRuleContext) -> bool:
    """Whether XLA splits the program over devices by itself, as it does not under shard_map."""
    axis_context = context.module_context.axis_context
    if isinstance(axis_context, mlir.ShardingContext):
        return axis_context.num_devices > 1
    if isinstance(axis_context, mlir.SPMDAxisContext):
        return axis_context.manual_axes != frozenset(axis_context.mesh.axis_names)
    return False


def explicit_mesh(types: Sequence) -> AbstractMesh | None:
    """The mesh of the arrays' types, if it has explicit axes."""
    meshes = (x.sharding.mesh for x in types)
    return next((mesh for mesh in meshes if axes_of(AxisType.Explicit, mesh)), None)


def is_explicit(mesh: Mesh | AbstractMesh | None) -> bool:
    """Whether all axes of the mesh are, so that types say all there is to say."""
    return mesh is not None and axes_of(AxisType.Explicit, mesh) == tuple(mesh.axis_names)


def axes_of(kind: AxisType, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The names of the mesh's axes of that kind."""
    by_name = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, axis_type in by_name if axis_type == kind)


def shard_map_of(
    axes: Axes, operand_types: Sequence, result_types: Sequence, mesh, device_function: Callable
) -> Callable:
    """The call where types say how all arrays are split, over a mesh of explicit axes.

    `device_function(plan)` is what `on_one_device` gives.
    """
    made = plan(axes, (*operand_types, *result_types), mesh)
    on_each = jax.shard_map(
        device_function(made),
        mesh=mesh,
        in_specs=made.in_specs,
        out_specs=list(made.out_specs),
        check_vma=False,
    )

    def call(*operands):
        results = on_each(*map(reshard, operands, made.in_specs))
        return [
            reshard(x, result_type.sharding.spec)
            for x, result_type in zip(results, result_types, strict=True)
        ]

    def reshard(x, spec):
        return jax.sharding.reshard(x, NamedSharding(mesh, spec))

    return call


def custom_partitioning_of(
    axes: Axes, name: str, whole: Callable, device_function: Callable
) -> Callable:
    """The call where XLA settles how arrays are split, and asks what each device is to do.

    `whole` is the function of whole arrays, `device_function(plan)` what `on_one_device`
    gives. The name says what the program does not, so that programs which do other things differ
    in JAX's persistent cache.
    """

    def partition(mesh, operand_types, result_types):
        made = plan(axes, (*operand_types, *result_types), mesh)
        in_shardings, out_shardings = (
            [NamedSharding(mesh, spec) for spec in specs]
            for specs in (made.in_specs, made.out_specs)
        )
        return mesh, device_function(made), out_shardings, tuple(in_shardings)

    letters = dict.fromkeys("".join((*axes.operands, *axes.results)))

    def named(*operands):
        return call(*operands)

    named.__name__ = name
    call = custom_partitioning(lambda *operands: whole(*operands))
    call.def_partition(
        partition,
        sharding_rule=" -> ".join(
            ", ".join(" ".join(array) for array in arrays)
            for arrays in (axes.operands, axes.results)
        ),
        reduction_factors=tuple(axis for axis in "knc" if axis not in axes.results[0]),
        need_replication_factors=tuple(axis for axis in letters if axis not in "gnkc"),
    )
    return jax.jit(named)


def takes_custom_partitioning(context: mlir.LoweringRuleContext) -> bool:
    """Whether XLA will ask, and has the devices: see `device_marker`."""
    module = context.module_context
    return (
        isinstance(module.axis_context, mlir.ShardingContext)
        and module.axis_context.device_assignment is not None
        and module.axis_context.abstract_mesh is not None
        and not module.lowering_parameters.for_export
        # https://github.com/jax-ml/jax/issues/38196
        and "tpu" not in module.platforms
    )


def device_marker(types: Sequence) -> ClosedJaxpr | None:
    """A parameter for primitives, with which JAX has the devices at hand when it lowers them.

    JAX looks for `custom_partitioning` in a program and in the parameters of its primitives
    (`jaxpr_has_prim_requiring_devices`), and where there is one it lowers for a concrete mesh. It
    then refuses an `AbstractMesh`, and several meshes, so this is None wherever it would be of no
    use: on one device, on TPUs, and where the types say how the arrays are split.
    """
    shardy = jax.config.jax_use_shardy_partitioner  # pyright: ignore[reportAttributeAccessIssue]
    if not shardy or is_explicit(explicit_mesh(types)):
        return None
    if jax.device_count() == 1 or jax.default_backend() == "tpu":
        return None
    return _one_custom_partitioning()


@functools.cache
def _one_custom_partitioning() -> ClosedJaxpr:
    call = custom_partitioning(lambda x: x)
    call.def_partition(lambda mesh, operands, results: None, sharding_rule="i -> i")
    return jax.make_jaxpr(call)(jax.ShapeDtypeStruct((1,), jnp.int32))


def in_auto_mode(function: Callable, result_types: Sequence, mesh: AbstractMesh) -> Callable:
    """`function` for operands of explicit shardings, its results sharded as their types say.

    Without it the `jnp` code of a backend would meet shardings from which it can infer no result's.
    """
    specs = [x.sharding.spec for x in result_types]

    def call(*operands):
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.sharding.auto_axes(
                function, axes=axes_of(AxisType.Explicit, mesh), out_sharding=specs
            )(*operands)

    return call
