"""The weighted sum of cells for P x Q bins per RoI: the primitives and their derivatives.

Nothing here knows of RoIs' coordinates or of what is averaged. There is one form, linear in four
arrays: features, what they are pooled to, and the weights of rows and of columns. Each primitive
has three of them and gives what stands beside the fourth. So the derivative of any of them by any
of its operands is one of them again: see `_backends/weighted_sum`.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
from jax.interpreters import ad

from jax_roipool._backends.weighted_sum import FAMILY
from jax_roipool._primitive import Declaration, DeclaredPrimitive
from jax_roipool._taps import Taps


def _first_dtype(first_dtype, **_):
    return [first_dtype]


def _weights_dtype(first_dtype, **_):
    return [np.dtype(np.float32)]


FEATURES, POOLED, CELLS, ROWS, COLUMNS = "gnhwc", "gkpqc", "gke", "gkpt", "gkqv"
"""The axes of the form's arrays, and of the cells, in which it is not linear."""


def _declare(name, operands, result, result_dtypes, sizes=("", "")):
    return DeclaredPrimitive(
        Declaration(
            name,
            f"{', '.join(operands)} -> {result}",
            FAMILY,
            result_dtypes,
            sizes,
            packed_index=operands.index(CELLS),
        )
    )


_PRIMITIVES = {
    POOLED: _declare("weighted_sum", (FEATURES, CELLS, ROWS, COLUMNS), POOLED, _first_dtype),
    FEATURES: _declare(
        "weighted_scatter",
        (POOLED, CELLS, ROWS, COLUMNS),
        FEATURES,
        _first_dtype,
        ("nhw", "map_shape"),
    ),
    ROWS: _declare(
        "row_weights", (FEATURES, POOLED, CELLS, COLUMNS), ROWS, _weights_dtype, ("t", "taps")
    ),
    COLUMNS: _declare(
        "column_weights", (FEATURES, POOLED, CELLS, ROWS), COLUMNS, _weights_dtype, ("v", "taps")
    ),
}
"""By the array that a primitive gives."""


def weighted_sum(
    features: jax.Array, taps: Taps, implementation: str | None, onto: jax.Array | None = None
) -> jax.Array:
    """The sum over each bin's taps, `[G, K, P, Q, C]`, of features `[G, n, H, W, C]`.

    RoIs without an image have 0, or what they have in `onto`, which is 0 for all others.
    """
    operands = [features, taps.cells, taps.rows, taps.columns]
    if onto is not None:
        operands.append(onto)
    (pooled,) = _PRIMITIVES[POOLED](*operands, run=taps.run, implementation=implementation)
    return pooled


def _jvp(primitive, primals, tangents, *, device_marker, **params):
    """The sum over the operands that have a tangent."""
    del device_marker
    (result,) = primitive(*primals, **params)
    total = ad.Zero(jax.typeof(result).to_tangent_aval())
    linear = primals[: len(primitive.declaration.operand_axes)]
    for i, tangent in enumerate(tangents[: len(linear)]):
        if not isinstance(tangent, ad.Zero):
            operands = (*linear[:i], tangent, *linear[i + 1 :])
            total = ad.add_tangents(total, *primitive(*operands, **params))
    for onto_tangent in tangents[len(linear) :]:
        total = ad.add_tangents(total, onto_tangent)
    return [result], [total]


def _transpose(
    given, cotangents, *operands, run, implementation, device_marker, result_sharding=None, **_
):
    """`given` is the array that the primitive gives, for which there is a cotangent now."""
    del device_marker, result_sharding
    operand_axes = _PRIMITIVES[given].declaration.operand_axes
    arrays = dict(zip(operand_axes, operands, strict=True))
    wanted = next(axes for axes, x in arrays.items() if ad.is_undefined_primal(x))
    aval = arrays[wanted].aval
    if isinstance(cotangents[0], ad.Zero):
        gradient = ad.Zero(aval)
    else:
        arrays[given] = cotangents[0]
        sizes = {FEATURES: {"map_shape": aval.shape[1:4]}, POOLED: {}}
        primitive = _PRIMITIVES[wanted]
        (gradient,) = primitive(
            *(arrays[axes] for axes in primitive.declaration.operand_axes),
            run=run,
            implementation=implementation,
            result_sharding=aval.sharding,
            **sizes.get(wanted, {"taps": aval.shape[3:]}),
        )
    return [gradient if axes == wanted else None for axes in operand_axes]


for _given, _primitive in _PRIMITIVES.items():
    ad.primitive_jvps[_primitive] = functools.partial(_jvp, _primitive)
    ad.primitive_transposes[_primitive] = functools.partial(_transpose, _given)
