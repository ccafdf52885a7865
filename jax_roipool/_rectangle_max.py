"""The maximum of a feature map over P x Q rectangles per RoI, as JAX primitives.

Nothing here knows of RoIs' coordinates, scales or conventions. Three primitives make up the
operator and all its derivatives:

- `rectangle_max`: features and rectangles to maxima (and argmaxes, when they are needed),
- `gather_at_argmax`: its tangent, linear in the features,
- `scatter_at_argmax`: the transpose of the gather, and so the gradient.

The last two are given the rectangles as well, which say where an argmax can be.

Features are `[G, n, H, W, C]` throughout: G groups of n images. `vmap` adds to G, or, where only
the rectangles are mapped, to their number K, so that no feature map is copied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from jax_roipool import _backends
from jax_roipool._partitioning import (
    BINS,
    MAPS,
    RECTANGLES,
    Call,
    in_auto_mode,
    is_partitioned,
    needs_devices,
)


class Rectangles(NamedTuple):
    """P x Q rectangles of cells for each of K RoIs in each of G groups, all int32.

    Rows `row_start <= row < row_end`, and columns likewise, inside the map. Starts do not
    decrease from bin to bin, and a bin reaches at most one cell into the next:
    `start[i + 1] <= end[i] <= start[i + 1] + 1` wherever bin `i` is not empty.
    An `image_index` outside `[0, n)` makes a RoI pool to 0.
    """

    image_index: jax.Array  # [G, K]
    row_start: jax.Array  # [G, K, P]
    row_end: jax.Array  # [G, K, P]
    col_start: jax.Array  # [G, K, Q]
    col_end: jax.Array  # [G, K, Q]


class Options(NamedTuple):
    """What is known when the operator is traced, beside shapes."""

    with_argmax: bool
    map_shape: tuple[int, int, int]  # n, H, W
    map_sharding: NamedSharding  # of the features, as their type has it
    empty_value: float
    implementation: str | None

    @property
    def how(self) -> dict:
        """The parameters by which a primitive is lowered."""
        named = _backends.splits_by_itself(self.implementation)
        return {
            "implementation": self.implementation,
            "needs_devices": None if named else needs_devices(self.map_sharding),
        }


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rectangle_max(
    features: jax.Array, rectangles: Rectangles, options: Options
) -> tuple[jax.Array, ...]:
    """Maximum of each rectangle, `[G, K, P, Q, C]`; with it, if asked for, its cell.

    The cell is `row * W + column`, int32, or -1 where there is none.
    """
    return _bind_max(features, rectangles, options, jnp.int32 if options.with_argmax else None)


def _rectangle_max_fwd(features, rectangles, options):
    argmax_dtype = jnp.int32 if options.with_argmax else _residual_dtype(features)
    pooled, argmax = _bind_max(features, rectangles, options, argmax_dtype)
    results = (pooled, argmax) if options.with_argmax else (pooled,)
    return results, (argmax, rectangles)


def _rectangle_max_bwd(options, residuals, cotangents):
    """The gradient of a bin goes whole to its argmax."""
    argmax, rectangles = residuals
    gradient = scatter_at_argmax_p.bind(
        cotangents[0],
        argmax,
        *rectangles,
        map_shape=options.map_shape,
        map_sharding=options.map_sharding,
        **options.how,
    )
    return gradient, None


rectangle_max.defvjp(_rectangle_max_fwd, _rectangle_max_bwd)


def _residual_dtype(features) -> type[np.signedinteger]:
    """The narrowest for an argmax: it is as long as the output, and costs time to move."""
    height, width = features.shape[2:4]
    return jnp.int16 if height * width <= jnp.iinfo(jnp.int16).max else jnp.int32


def _bind_max(features, rectangles, options, argmax_dtype):
    return tuple(
        rectangle_max_p.bind(
            features,
            *rectangles,
            argmax_dtype=argmax_dtype and np.dtype(argmax_dtype),
            empty_value=options.empty_value,
            **options.how,
        )
    )


# The primitives' names are those of the functions of a backend that implement them.
rectangle_max_p = Primitive("rectangle_max")
rectangle_max_p.multiple_results = True
gather_at_argmax_p = Primitive("gather_at_argmax")
scatter_at_argmax_p = Primitive("scatter_at_argmax")


# Types of the results. Besides shape and dtype an array's type says over which mesh axes it varies
# under shard_map. JAX works all of it out from a stand-in: cheap operations with the same shapes
# that depend on the operands as the primitive does. They are traced and never run.


def _rectangle_max_stand_in(
    features, image_index, row_start, row_end, col_start, col_end, *, argmax_dtype
):
    bins = _sum_of_edges(image_index, row_start, row_end, col_start, col_end)
    pooled = _sum_of_maps(features) + bins.astype(features.dtype)
    return [pooled, pooled.astype(argmax_dtype)] if argmax_dtype else [pooled]


def _gather_at_argmax_stand_in(features, argmax, *rectangles):
    cell = argmax + _sum_of_edges(*rectangles)
    return _sum_of_maps(features) + cell.astype(features.dtype)


def _scatter_at_argmax_stand_in(cotangent, argmax, *rectangles, map_shape, map_sharding):
    cell = argmax + _sum_of_edges(*rectangles)
    shape = (cotangent.shape[0], *map_shape, cotangent.shape[-1])
    maps = jnp.broadcast_to(_sum_of_maps(cotangent + cell.astype(cotangent.dtype)), shape)
    cells = map_sharding.spec[1:4] if map_sharding else ()
    if not any(cells):
        return maps
    groups, *_, channels = jax.typeof(maps).sharding.spec
    sharding = NamedSharding(map_sharding.mesh, PartitionSpec(groups, *cells, channels))
    return jax.sharding.reshard(maps, sharding)


def _sum_of_edges(image_index, row_start, row_end, col_start, col_end):
    row, col = row_start + row_end, col_start + col_end
    bins = row[:, :, :, None] + col[:, :, None, :] + image_index[:, :, None, None]
    return bins[..., None]


def _sum_of_maps(x):
    return x.sum(axis=(1, 2, 3), keepdims=True, dtype=x.dtype)


def _types(stand_in: Callable, multiple_results: bool) -> Callable:
    def rule(*operands, implementation, needs_devices, empty_value=None, **params):
        del implementation, needs_devices, empty_value
        types = jax.make_jaxpr(functools.partial(stand_in, **params))(*operands).out_avals
        return types if multiple_results else types[0]

    return rule


# Derivatives.


def _rectangle_max_jvp(primals, tangents, *, argmax_dtype, empty_value, **how):
    pooled, argmax = rectangle_max_p.bind(
        *primals,
        argmax_dtype=argmax_dtype or np.dtype(_residual_dtype(primals[0])),
        empty_value=empty_value,
        **how,
    )
    tangent, rectangles = tangents[0], primals[1:]
    if isinstance(tangent, ad.Zero):
        pooled_dot = _zero_tangent(pooled)
    else:
        pooled_dot = gather_at_argmax_p.bind(tangent, argmax, *rectangles, **how)
    if argmax_dtype is None:
        return [pooled], [pooled_dot]
    return [pooled, argmax], [pooled_dot, _zero_tangent(argmax)]


def _zero_tangent(primal):
    return ad.Zero(jax.typeof(primal).to_tangent_aval())


def _gather_at_argmax_transpose(cotangent, features, argmax, *rectangles, **how):
    not_linear = [None] * (1 + len(rectangles))
    if isinstance(cotangent, ad.Zero):
        return ad.Zero(features.aval), *not_linear
    gradient = scatter_at_argmax_p.bind(
        cotangent,
        argmax,
        *rectangles,
        map_shape=features.aval.shape[1:4],
        map_sharding=features.aval.sharding,
        **how,
    )
    return gradient, *not_linear


def _scatter_at_argmax_transpose(
    gradient, cotangent, argmax, *rectangles, map_shape, map_sharding, **how
):
    not_linear = [None] * (1 + len(rectangles))
    if isinstance(gradient, ad.Zero):
        return ad.Zero(cotangent.aval), *not_linear
    gathered = gather_at_argmax_p.bind(gradient, argmax, *rectangles, **how)
    return gathered, *not_linear


def _jvp_linear_in_first(primitive: Primitive) -> None:
    def rule(tangent, *primals, **params):
        return primitive.bind(tangent, *primals[1:], **params)

    not_linear = [None] * (1 + len(Rectangles._fields))
    ad.defjvp(primitive, rule, *not_linear)


# Batching. Every operand starts with G; those after the features go on with K.


def _batch_into_groups(primitive: Primitive, operands, dims, **params):
    """The mapped axis joins G."""
    return _batch_into(0, primitive, operands, dims, **params)


def _batch_into_rois(primitive: Primitive, operands, dims, **params):
    """The mapped axis joins K, as long as the features are not mapped themselves."""
    return _batch_into(0 if dims[0] is not None else 1, primitive, operands, dims, **params)


def _batch_into(axis, primitive, operands, dims, **params):
    """The mapped axis joins that one, G or K, in all operands that have it.

    It becomes the outer part, or, if the axis is known to be sharded, the inner one: only the outer
    part of an axis can be sharded.
    """
    untouched, operands, dims = operands[:axis], operands[axis:], dims[axis:]
    size = _mapped_size(operands, dims)
    at = axis + any(_is_sharded(axis, *each) for each in zip(operands, dims, strict=True))
    operands = [_mapped_at(at, *each, size) for each in zip(operands, dims, strict=True)]
    sizes = operands[0].shape[axis : axis + 2]
    results = primitive.bind(*untouched, *(_join(x, axis) for x in operands), **params)
    if not primitive.multiple_results:
        return _split(results, axis, sizes), at
    return [_split(result, axis, sizes) for result in results], [at] * len(results)


def _mapped_size(operands, dims) -> int:
    return next(
        operand.shape[dim] for operand, dim in zip(operands, dims, strict=True) if dim is not None
    )


def _is_sharded(axis, operand, dim) -> bool:
    """Whether the type says that the operand's axis, not counting the mapped one, is sharded."""
    spec = jax.typeof(operand).sharding.spec
    return spec[axis + (dim is not None and dim <= axis)] is not None


def _mapped_at(position, operand, dim, size):
    """The operand with its mapped axis, or a new one of that size, at `position`."""
    if dim is not None:
        return jnp.moveaxis(operand, dim, position)
    shape = operand.shape
    return jnp.broadcast_to(
        jnp.expand_dims(operand, position), (*shape[:position], size, *shape[position:])
    )


def _join(operand, axis):
    shape = operand.shape
    return operand.reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])


def _split(result, axis, sizes):
    return result.reshape(*result.shape[:axis], *sizes, *result.shape[axis + 1 :])


# Lowering, and what a call outside of jit does.

_AXES = {
    rectangle_max_p: (MAPS, *RECTANGLES, BINS),
    gather_at_argmax_p: (MAPS, BINS, *RECTANGLES, BINS),
    scatter_at_argmax_p: (BINS, BINS, *RECTANGLES, MAPS),
}
"""Those of each operand, and of a result."""


def _lower(
    primitive: Primitive,
    platform: str | None,
    ctx: mlir.LoweringRuleContext,
    *operands,
    implementation,
    needs_devices,
    **params,
):
    """Lowers for one platform, or, if it is None, for all that have no backend of their own."""
    scatters = primitive is scatter_at_argmax_p
    params.pop("map_sharding", None)  # which only types are made of
    partitioned = is_partitioned(ctx)
    function = None
    if partitioned:

        def on_one_device(*operands, images):
            how = params | {"implementation": implementation, "needs_devices": None}
            if scatters:
                how["map_shape"] = (images, *params["map_shape"][1:])
                how["map_sharding"] = None
            return primitive.bind(*operands, **how)

        *operand_axes, result_axes = _AXES[primitive]
        function = Call(
            _listing(primitive, on_one_device),
            operand_axes,
            [result_axes] * len(ctx.avals_out),
            (ctx.avals_out if scatters else ctx.avals_in)[0].shape[1],  # pyright: ignore
        ).on_each_device(ctx, needs_devices is not None)
    if function is None:
        others = [p for p in ctx.module_context.platforms if p not in _backends.BEST_FIRST]
        platforms = others if platform is None else [platform]
        backend = _backends.select(implementation, platforms, partitioned)
        function = functools.partial(getattr(backend, primitive.name), **params)
        function = in_auto_mode(_listing(primitive, function), ctx)
    return mlir.lower_fun(function, multiple_results=True)(ctx, *operands)


def _listing(primitive: Primitive, function: Callable) -> Callable:
    if primitive.multiple_results:
        return function
    return lambda *operands, **params: [function(*operands, **params)]


def _register(primitive: Primitive, stand_in: Callable, batching_rule: Callable) -> None:
    primitive.def_abstract_eval(_types(stand_in, primitive.multiple_results))
    primitive.def_impl(_compiled(primitive))
    batching.primitive_batchers[primitive] = functools.partial(batching_rule, primitive)
    for platform in (None, *_backends.BEST_FIRST):
        mlir.register_lowering(
            primitive, functools.partial(_lower, primitive, platform), platform=platform
        )


def _compiled(primitive: Primitive) -> Callable:
    @functools.partial(jax.jit, static_argnames="params")
    def call(*operands, params):
        return primitive.bind(*operands, **dict(params))

    def impl(*operands, **params):
        with jax.disable_jit(False):  # else call would bind, and bind would call, without end
            return call(*operands, params=tuple(params.items()))

    return impl


_register(rectangle_max_p, _rectangle_max_stand_in, _batch_into_rois)
_register(gather_at_argmax_p, _gather_at_argmax_stand_in, _batch_into_rois)
_register(scatter_at_argmax_p, _scatter_at_argmax_stand_in, _batch_into_groups)

ad.primitive_jvps[rectangle_max_p] = _rectangle_max_jvp
_jvp_linear_in_first(gather_at_argmax_p)
_jvp_linear_in_first(scatter_at_argmax_p)
ad.primitive_transposes[gather_at_argmax_p] = _gather_at_argmax_transpose
ad.primitive_transposes[scatter_at_argmax_p] = _scatter_at_argmax_transpose
