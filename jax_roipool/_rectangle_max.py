"""The maximum of a feature map over P x Q rectangles per RoI: the primitives and their derivatives.

Nothing here knows of RoIs' coordinates, scales or conventions. Three primitives make up the
operator and all its derivatives:

- `rectangle_max`: features and edges to maxima (and argmaxes, when they are needed),
- `gather_at_argmax`: its tangent, linear in the features,
- `scatter_at_argmax`: the transpose of the gather, and so the gradient.

Features are `[G, n, H, W, C]`, edges `[G, K, 1 + 2P + 2Q]`: see `_backends/rectangle_max`.
"""

from __future__ import annotations

import functools
import math

import jax
import numpy as np
from jax.export import is_symbolic_dim
from jax.interpreters import ad

from jax_roipool._backends.rectangle_max import FAMILY
from jax_roipool._manual_axes import vary_together
from jax_roipool._primitive import Declaration, DeclaredPrimitive


def _max_dtypes(features_dtype, *, argmax_dtype, **_):
    return [features_dtype] if argmax_dtype is None else [features_dtype, argmax_dtype]


def _same_dtype(first_dtype, **_):
    return [first_dtype]


rectangle_max_p = DeclaredPrimitive(
    Declaration(
        "rectangle_max",
        "gnhwc, gke -> gkpqc",
        FAMILY,
        result_dtypes=_max_dtypes,
        sizes=("pq", "output_size"),
        packed_index=1,
        absent=(0, -1),
    )
)
gather_at_argmax_p = DeclaredPrimitive(
    Declaration(
        "gather_at_argmax",
        "gnhwc, gkpqc, gke -> gkpqc",
        FAMILY,
        result_dtypes=_same_dtype,
        packed_index=2,
    )
)
scatter_at_argmax_p = DeclaredPrimitive(
    Declaration(
        "scatter_at_argmax",
        "gkpqc, gkpqc, gke -> gnhwc",
        FAMILY,
        result_dtypes=_same_dtype,
        sizes=("nhw", "map_shape"),
        packed_index=2,
    )
)


def rectangle_max(
    features: jax.Array,
    edges: jax.Array,
    output_size: tuple[int, int],
    *,
    with_argmax: bool,
    empty_value: float,
    implementation: str | None,
    forward_mode: bool,
    onto: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """Maximum of each rectangle, `[G, K, P, Q, C]`; with it, if asked for, its cell.

    The cell is `row * W + column`, int32, or -1 where there is none. In forward mode the primitive
    stands for itself, with its own derivatives: a `jax.custom_vjp` has no tangents. RoIs without an
    image have 0, or what they have in `onto`, which is 0 for all others.
    """
    # Outside of the custom VJP, so that JAX sums the gradient over the mesh axes that are added.
    operands = tuple(vary_together(features, edges, *([] if onto is None else [onto])))
    static = {
        "output_size": output_size,
        "empty_value": empty_value,
        "implementation": implementation,
    }
    if forward_mode:
        return _maxima(operands, with_argmax, static)
    return _pool(operands, with_argmax, jax.typeof(operands[0]), tuple(static.items()))


def _maxima(operands, with_argmax, static):
    argmax_dtype = np.dtype(np.int32) if with_argmax else None
    return tuple(rectangle_max_p(*operands, argmax_dtype=argmax_dtype, **static))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _pool(operands, with_argmax, features_type, static):
    del features_type
    return _maxima(operands, with_argmax, dict(static))


def _pool_fwd(operands, with_argmax, features_type, static):
    argmax_dtype = np.dtype(np.int32) if with_argmax else _residual_dtype(features_type)
    pooled, argmax = rectangle_max_p(*operands, argmax_dtype=argmax_dtype, **dict(static))
    _, edges, *onto = operands
    nothing = [None for _ in onto]  # says that there is one
    return (pooled, argmax) if with_argmax else (pooled,), (argmax, edges, nothing)


def _pool_bwd(with_argmax, features_type, static, residuals, cotangents):
    """The gradient of a bin goes whole to its argmax."""
    del with_argmax
    argmax, edges, onto = residuals
    implementation = dict(static)["implementation"]
    gradient = _scatter(cotangents[0], argmax, edges, features_type, implementation)
    return ((gradient, None, *(cotangents[0] for _ in onto)),)


_pool.defvjp(_pool_fwd, _pool_bwd)


def _residual_dtype(features_type) -> np.dtype:
    """The narrowest for an argmax: it is as long as the output, and costs time to move."""
    cells = math.prod(features_type.shape[2:4])
    fits = not is_symbolic_dim(cells) and cells - 1 <= np.iinfo(np.int16).max
    return np.dtype(np.int16 if fits else np.int32)


def _scatter(cotangent, argmax, edges, features_type, implementation):
    """The gradient of features of that type, `[G, n, H, W, C]`."""
    (gradient,) = scatter_at_argmax_p(
        cotangent,
        argmax,
        edges,
        map_shape=features_type.shape[1:4],
        result_sharding=features_type.sharding,
        implementation=implementation,
    )
    return gradient


# Derivatives. Of all the operands, features and cotangents alone have one; the rest are integers.


def _rectangle_max_jvp(
    primals, tangents, *, argmax_dtype, output_size, empty_value, implementation, device_marker
):
    """With `argmax` constant, the maxima are `gather_at_argmax` of the features, and linear."""
    del device_marker
    features, edges, *_ = primals
    pooled, argmax = rectangle_max_p(
        *primals,
        argmax_dtype=argmax_dtype or _residual_dtype(jax.typeof(features)),
        output_size=output_size,
        empty_value=empty_value,
        implementation=implementation,
    )
    if isinstance(tangents[0], ad.Zero):
        pooled_dot = _zero_tangent(pooled)
    else:
        (pooled_dot,) = gather_at_argmax_p(
            tangents[0], argmax, edges, implementation=implementation
        )
    for onto_tangent in tangents[2:]:
        pooled_dot = ad.add_tangents(pooled_dot, onto_tangent)
    if argmax_dtype is None:
        return [pooled], [pooled_dot]
    return [pooled, argmax], [pooled_dot, _zero_tangent(argmax)]


def _linear_jvp(primitive, primals, tangents, *, device_marker, **params):
    """Of a primitive that is linear in its first operand."""
    del device_marker
    first, *others = primals
    (result,) = primitive(first, *others, **params)
    if isinstance(tangents[0], ad.Zero):
        return [result], [_zero_tangent(result)]
    return [result], primitive(tangents[0], *others, **params)


def _gather_transpose(cotangents, features, argmax, edges, *, implementation, device_marker):
    del device_marker
    (cotangent,) = cotangents
    if isinstance(cotangent, ad.Zero):
        return ad.Zero(features.aval), None, None
    return _scatter(cotangent, argmax, edges, features.aval, implementation), None, None


def _scatter_transpose(
    cotangents, cotangent, argmax, edges, *, implementation, device_marker, map_shape, **_
):
    """`cotangents` are those of the gradient, which is linear in `cotangent`."""
    del device_marker, map_shape
    (gradient,) = cotangents
    if isinstance(gradient, ad.Zero):
        return ad.Zero(cotangent.aval), None, None
    (gathered,) = gather_at_argmax_p(gradient, argmax, edges, implementation=implementation)
    return gathered, None, None


def _zero_tangent(primal):
    return ad.Zero(jax.typeof(primal).to_tangent_aval())


ad.primitive_jvps[rectangle_max_p] = _rectangle_max_jvp
for _primitive in (gather_at_argmax_p, scatter_at_argmax_p):
    ad.primitive_jvps[_primitive] = functools.partial(_linear_jvp, _primitive)
ad.primitive_transposes[gather_at_argmax_p] = _gather_transpose
ad.primitive_transposes[scatter_at_argmax_p] = _scatter_transpose
