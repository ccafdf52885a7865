"""What every primitive of this library needs, from a declaration of its axes.

Primitives, rather than plain functions, so that `vmap` can join a mapped axis to one that the
backends loop over anyway, so that derivatives are primitives again, and so that a program has the
best backend of the platform that it is lowered for, and on many devices of each device's part.

The axes are letters with one meaning throughout: g groups, n images of a group, h rows, w columns,
c channels, k RoIs, p and q rows and columns of bins, e edges. Every array has g. The letters say

- types: a result's axis has the size and the sharding that an operand's axis of that letter has;
- batching: a mapped axis joins k, if all that is mapped has k, and else g;
- partitioning: see `_partitioning.py`;
- lowering: a backend's function of the primitive's name, with the primitive's parameters.

A primitive whose results have k takes one operand more than it declares, `onto`, an array like its
first result: a RoI without an image keeps what it has there. It must be 0 for all others.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from jax_roipool import _partitioning
from jax_roipool._backends import Family
from jax_roipool._manual_axes import vary_together
from jax_roipool._partitioning import Axes


@dataclasses.dataclass(frozen=True)
class Declaration:
    """A primitive, stated.

    Attributes:
      name: also that of the backends' functions.
      axes: letters of operands and results, such as `"gnhwc, gke -> gkpqc"`. If there are several
        results, all have the same axes.
      family: whose backends implement it.
      result_dtypes: the dtype of each result, from the first operand's and the parameters.
      sizes: letters of axes that no operand has, and the parameter that has their sizes.
      packed_index: the operand, `gk...`, whose last axis starts with the index of the RoI's image.
      absent: what each result has for a RoI without an image.
    """

    name: str
    axes: str
    family: Family
    result_dtypes: Callable[..., Sequence]
    sizes: tuple[str, str] = ("", "")
    packed_index: int | None = None
    absent: tuple[int, ...] = (0,)

    @property
    def operand_axes(self) -> tuple[str, ...]:
        """The letters of each operand that is declared."""
        return tuple(self.axes.split(" -> ")[0].split(", "))

    def axes_of(self, operands: Sequence) -> tuple[str, ...]:
        """The letters of these operands, of which `onto` may be one."""
        return (*self.operand_axes, self.result_axes)[: len(operands)]

    def has_onto(self, operands: Sequence) -> bool:
        """Whether the last of the operands is `onto`."""
        return len(operands) > len(self.operand_axes)

    @property
    def result_axes(self) -> str:
        """The letters of every result."""
        return self.axes.split(" -> ")[1]


class DeclaredPrimitive(Primitive):
    """A primitive with every rule but those of differentiation. It returns a list."""

    multiple_results = True

    def __init__(self, declaration: Declaration):
        super().__init__(declaration.name)
        self.declaration = declaration
        self.def_abstract_eval(functools.partial(_result_types, declaration))
        self.def_impl(functools.partial(_run, self))
        batching.primitive_batchers[self] = functools.partial(_batch, self)
        for platform in (None, *declaration.family.platforms):
            rule = functools.partial(_lower, self, platform)
            mlir.register_lowering(self, rule, platform=platform)

    def __call__(
        self, *operands: jax.Array, implementation: str | None, **params
    ) -> list[jax.Array]:
        """The results for these operands; `params` are what the backends' functions take."""
        types = [jax.typeof(x) for x in operands]
        splits_by_itself = self.declaration.family.is_partitionable(implementation)
        return self.bind(
            *vary_together(*operands),
            implementation=implementation,
            device_marker=None if splits_by_itself else _partitioning.device_marker(types),
            **params,
        )


# Types.


def _result_types(
    declaration: Declaration,
    *operands,
    implementation,
    device_marker,
    result_sharding: NamedSharding | None = None,
    **params,
):
    """Arrays of the first operand's kind; a sharding that is given overrules the operands'."""
    del implementation, device_marker
    arrays = list(zip(declaration.axes_of(operands), operands, strict=True))
    letters, param = declaration.sizes
    sizes = dict(zip(letters, params.get(param, ()), strict=True))
    for axes, array in arrays:
        sizes |= zip(axes, array.shape, strict=True)
    result_axes = declaration.result_axes
    if result_sharding is None:
        meshes = [x.sharding.mesh for x in operands]
        mesh = next((mesh for mesh in meshes if not mesh.empty), meshes[0])
        split = _partitioning.mesh_axes(arrays)
        spec = PartitionSpec(*(split.get(axis) or None for axis in result_axes))
        result_sharding = NamedSharding(mesh, spec)
    shape = tuple(sizes[axis] for axis in result_axes)
    return [
        operands[0].update(
            shape=shape, dtype=np.dtype(dtype), weak_type=False, sharding=result_sharding
        )
        for dtype in declaration.result_dtypes(operands[0].dtype, **params)
    ]


# Batching.


def _batch(primitive: DeclaredPrimitive, operands, dims, *, result_sharding=None, **params):
    """The mapped axis joins k, if all that is mapped and the results have k; else g.

    Only the outer part of an axis can be sharded. The mapped axis becomes that, unless the axis is
    sharded and the mapped one is not.
    """
    declaration = primitive.declaration
    operand_axes = declaration.axes_of(operands)
    mapped = list(zip(operand_axes, operands, dims, strict=True))
    only_rois = all(dim is None or "k" in axes for axes, _, dim in mapped)
    letter = "k" if only_rois and "k" in declaration.result_axes else "g"
    mapped = [_Mapped(x, axes.index(letter), dim) for axes, x, dim in mapped if letter in axes]
    size = next(x.shape[dim] for x, dim in zip(operands, dims, strict=True) if dim is not None)
    outer = next((x.mapped_names for x in mapped if x.mapped_names), None)
    is_sharded = any(x.axis_names for x in mapped)
    if result_sharding is not None:
        g, *others = result_sharding.spec
        is_sharded |= g is not None
        free = {*jax.tree.leaves(outer)}.isdisjoint(jax.tree.leaves(tuple(others)))
        spec = PartitionSpec(outer if outer and free else g, *others)
        params["result_sharding"] = NamedSharding(result_sharding.mesh, spec)
    inner = is_sharded and not outer

    joined = iter([x.joined(size, inner) for x in mapped])
    operands = [
        next(joined) if letter in axes else x
        for axes, x in zip(operand_axes, operands, strict=True)
    ]
    results = primitive.bind(*operands, **params)
    at = declaration.result_axes.index(letter)
    sizes = (mapped[0].axis_size, size) if inner else (size, mapped[0].axis_size)
    return [_split(x, at, sizes) for x in results], [at + inner] * len(results)


class _Mapped(NamedTuple):
    """An operand with a mapped axis, or without one, and the axis that this is to join."""

    array: jax.Array
    axis: int  # not counting the mapped one
    dim: int | None  # the mapped axis

    @property
    def _axis_in_array(self) -> int:
        return self.axis + (self.dim is not None and self.dim <= self.axis)

    @property
    def axis_size(self) -> int:
        return self.array.shape[self._axis_in_array]

    @property
    def axis_names(self):
        """The mesh axes that the type says the axis is sharded over, or None."""
        return jax.typeof(self.array).sharding.spec[self._axis_in_array]

    @property
    def mapped_names(self):
        """The mesh axes that the type says the mapped axis is sharded over, or None."""
        return None if self.dim is None else jax.typeof(self.array).sharding.spec[self.dim]

    def joined(self, size: int, inner: bool) -> jax.Array:
        """The array with the mapped axis, or a new one of that size, as a part of the axis."""
        array = self.array
        if self.axis_names is not None and not inner:
            sharding = jax.typeof(array).sharding
            spec = list(sharding.spec)
            spec[self._axis_in_array] = None
            array = jax.sharding.reshard(array, NamedSharding(sharding.mesh, PartitionSpec(*spec)))
        at = self.axis + inner
        if self.dim is None:
            shape = array.shape
            array = jnp.expand_dims(array, at)
            array = jnp.broadcast_to(array, (*shape[:at], size, *shape[at:]))
        else:
            array = jnp.moveaxis(array, self.dim, at)
        shape, axis = array.shape, self.axis
        return array.reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])


def _split(result: jax.Array, axis: int, sizes: tuple[int, int]) -> jax.Array:
    return result.reshape(*result.shape[:axis], *sizes, *result.shape[axis + 1 :])


# Lowering, and what a call outside of jit does.


def _lower(
    primitive: DeclaredPrimitive,
    platform: str | None,
    context: mlir.LoweringRuleContext,
    *operands,
    implementation,
    device_marker,
    result_sharding=None,
    **params,
):
    """Lowers for one platform, or, if it is None, for all that are served alike.

    Where the program is split over devices, each is to bind the primitive again with its parts. It
    then stands in a program for one device, and is lowered by a backend.
    """
    del result_sharding  # which only types are made of
    declaration = primitive.declaration
    types, result_types = context.avals_in, context.avals_out
    family = declaration.family
    others = [p for p in context.module_context.platforms if p not in family.platforms]
    select = functools.partial(
        family.select,
        implementation,
        others if platform is None else [platform],
        symbolic=_are_symbolic(types),
    )
    partitioned = _partitioning.is_partitioned(context)
    if declaration.has_onto(types) and (
        partitioned or declaration.name not in select(partitioned=False).takes_onto
    ):
        params |= {"implementation": implementation, "device_marker": device_marker}
        function = functools.partial(_choose_afterwards, primitive, result_types, params)
        return mlir.lower_fun(function, multiple_results=True)(context, *operands)
    mesh = _partitioning.explicit_mesh((*types, *result_types))
    axes = Axes(
        declaration.operand_axes,
        (declaration.result_axes,) * len(result_types),
        declaration.packed_index,
    )
    bind_parts = functools.partial(_bind_on_one_device, primitive, implementation, params)

    def device_function(plan):
        return _partitioning.on_one_device(plan, axes, declaration.absent, bind_parts)

    if partitioned and _partitioning.is_explicit(mesh):
        function = _partitioning.shard_map_of(axes, types, result_types, mesh, device_function)
        return mlir.lower_fun(function, multiple_results=True)(context, *operands)

    is_asked = partitioned and device_marker and _partitioning.takes_custom_partitioning(context)
    # Also where XLA will ask for each device's part: of a program that comes from a cache, it does
    # not, and finds a kernel only if one was loaded.
    backend = select(partitioned=partitioned and not is_asked)
    if is_asked:
        name = "_".join(map(str, (declaration.name, backend.name, *params.values())))
        function = _partitioning.custom_partitioning_of(axes, name, bind_parts, device_function)
    else:
        function = functools.partial(backend.functions[declaration.name], **params)
    if mesh is not None:
        function = _partitioning.in_auto_mode(function, result_types, mesh)
    return mlir.lower_fun(function, multiple_results=True)(context, *operands)


def _choose_afterwards(primitive, result_types, params, *operands):
    """What a primitive gives with `onto`, from what it gives without."""
    *operands, onto = operands
    declaration = primitive.declaration
    sizes = dict(zip(declaration.operand_axes[0], operands[0].shape, strict=True))
    first, *rest = primitive.bind(*operands, **params)
    index = operands[declaration.packed_index][..., 0]
    first = _partitioning.choose((index >= 0) & (index < sizes["n"]), first, onto)
    if not result_types[0].sharding.mesh.empty:
        first = jax.sharding.reshard(first, result_types[0].sharding)
    return [first, *rest]


def _are_symbolic(types):
    return any(is_symbolic_dim(size) for x in types for size in x.shape)


def _bind_on_one_device(primitive, implementation, params, *parts, images=None):
    letters, param = primitive.declaration.sizes
    if images is not None and "n" in letters:
        sizes = dict(zip(letters, params[param], strict=True)) | {"n": images}
        params = params | {param: tuple(sizes.values())}
    return primitive.bind(*parts, implementation=implementation, device_marker=None, **params)


@functools.partial(jax.jit, static_argnames=("primitive", "params"))
def _compiled(*operands, primitive, params):
    return primitive.bind(*operands, **dict(params))


def _run(primitive, *operands, **params):
    with jax.disable_jit(False):  # else it would bind the primitive, and be called, without end
        return _compiled(*operands, primitive=primitive, params=tuple(params.items()))
