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
    operands = [features, edges]
    if plan.make_windows is not None:
        used = _windows_pay(edges, problem)
        shape = (G, n, *plan.windows, C)
        places_dtype = None if argmax_dtype is None else np.uint8
        windows = _results(shape, features.dtype, places_dtype)
        operands += [used, *xla_call.call(plan.make_windows, windows, features, used)]
    shape = (G, problem.K, problem.P, problem.Q, C)
    return xla_call.call(plan.pool, _results(shape, features.dtype, argmax_dtype), *operands)


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
    # A block's threads read the edges of as many RoIs at once.
    by_lane = edges.swapaxes(1, 2)
    return xla_call.call(
        kernel, _results((G, n, H, W, C), cotangent.dtype), cotangent, argmax, by_lane
    )


def _results(shape: tuple[int, ...], *dtypes) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes if dtype is not None]


def _windows_pay(edges: jax.Array, problem: plans.Problem) -> jax.Array:
    """Whether all bins have several times as many cells as there are, so that windows save reads.

    int32, for kernels to read: known only when the program runs.
    """
    _, row_start, row_end, col_start, col_end = split_edges(edges, (problem.P, problem.Q))
    rows = (row_end - row_start).sum(2).astype(jnp.float32)
    columns = (col_end - col_start).sum(2).astype(jnp.float32)
    cells = problem.G * problem.n * problem.H * problem.W
    return ((rows * columns).sum() > np.float32(4 * cells)).astype(jnp.int32)
