"""The CUDA backend: kernels in CUDA C++, compiled for each problem when a program is lowered.

Their sources are in `kernels/`; `plans.py` says which a call needs, `nvrtc.py` compiles them, and
`xla_call.py` has XLA launch them. Nothing is built at installation. What no kernel takes, the
portable backend `blocks` does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jax_roipool._backends.rectangle_max import blocks
from jax_roipool._backends.rectangle_max.cuda import nvrtc, plans, xla_call
from jax_roipool._backends.rectangle_max.portable import split_edges

CUSTOM_CALL = xla_call.TARGET

unavailable_reason = nvrtc.problem


def rectangle_max(features, edges, *, output_size, argmax_dtype, empty_value):
    """See `jax_roipool._backends.rectangle_max`."""
    G, n, H, W, C = features.shape
    problem = plans.Problem(G, n, H, W, C, edges.shape[1], *output_size)
    plan = None
    if 0 not in problem:
        plan = plans.rectangle_max(
            problem, features.dtype, argmax_dtype, empty_is_least=empty_value < 0
        )
    if plan is None:
        return blocks.rectangle_max(
            features,
            edges,
            output_size=output_size,
            argmax_dtype=argmax_dtype,
            empty_value=empty_value,
        )
    dtypes = [features.dtype, *([] if argmax_dtype is None else [argmax_dtype])]
    operands = [features, edges]
    if plan.make_tiles is not None:
        used = _tiles_pay(edges, problem)
        shapes = [jax.ShapeDtypeStruct((plan.tiles, problem.C), dtype) for dtype in dtypes]
        operands += [used, *xla_call.call(plan.make_tiles, shapes, features, used)]
    shape = (problem.G, problem.K, problem.P, problem.Q, problem.C)
    results = [jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes]
    return xla_call.call(plan.pool, results, *operands)


gather_at_argmax = blocks.gather_at_argmax


def scatter_at_argmax(cotangent, argmax, edges, *, map_shape):
    """See `jax_roipool._backends.rectangle_max`."""
    G, K, P, Q, C = cotangent.shape
    n, H, W = map_shape
    problem = plans.Problem(G, n, H, W, C, K, P, Q)
    kernel = None
    if 0 not in problem:
        kernel = plans.scatter_at_argmax(problem, cotangent.dtype, argmax.dtype)
    if kernel is None:
        return blocks.scatter_at_argmax(cotangent, argmax, edges, map_shape=map_shape)
    result = jax.ShapeDtypeStruct((G, n, H, W, C), cotangent.dtype)
    return xla_call.call(kernel, [result], cotangent, argmax, edges)


def _tiles_pay(edges: jax.Array, problem: plans.Problem) -> jax.Array:
    """Whether all bins have several times as many cells as there are, so that tiles save reads.

    int32, for kernels to read: known only when the program runs.
    """
    _, row_start, row_end, col_start, col_end = split_edges(edges, (problem.P, problem.Q))
    rows = (row_end - row_start).sum(2).astype(jnp.float32)
    columns = (col_end - col_start).sum(2).astype(jnp.float32)
    cells = problem.G * problem.n * problem.H * problem.W
    return ((rows * columns).sum() > np.float32(4 * cells)).astype(jnp.int32)
