"""The TPU backend: Pallas kernels for maxima and for their gradient.

They take float32 and bfloat16, in any shape whose blocks fit a TPU's memories; the dense backend
serves the rest, and the tangent.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_roipool._backends import dense


def rectangle_max(features, *rectangles, argmax_dtype, empty_value, interpret=False):
    """See `jax_roipool._rectangle_max`: maxima, and argmaxes if asked for, `[G, K, P, Q, C]`."""
    options = {"argmax_dtype": argmax_dtype, "empty_value": empty_value}
    if _can_be_taken(features) and rectangles[0].size > 0:
        from jax_roipool._backends.tpu import pool  # Pallas takes a tenth of a second to import

        blocks = pool.blocks(features, rectangles)
        if blocks is not None:
            return pool.rectangle_max(features, rectangles, blocks, interpret=interpret, **options)
    return dense.rectangle_max(features, *rectangles, **options)


def scatter_at_argmax(cotangent, argmax, *rectangles, map_shape, interpret=False):
    """Each cotangent added at its argmax, none where it is -1: `[G, n, H, W, C]`."""
    if _can_be_taken(cotangent) and 0 not in map_shape:
        from jax_roipool._backends.tpu import scatter

        blocks = scatter.blocks(cotangent, map_shape)
        if blocks is not None:
            return scatter.scatter_at_argmax(
                cotangent, argmax, rectangles, blocks, map_shape=map_shape, interpret=interpret
            )
    return dense.scatter_at_argmax(cotangent, argmax, *rectangles, map_shape=map_shape)


gather_at_argmax = dense.gather_at_argmax


def what_keeps_it_from_use() -> str | None:
    """None: the kernels are compiled with the program."""
    return None


def _can_be_taken(array) -> bool:
    if jax.config.jax_enable_x64 and jax.__version_info__ < (0, 10):  # pyright: ignore
        return False  # seen with JAX 0.6.2: Pallas recurses without end
    return array.dtype in (jnp.float32, jnp.bfloat16) and array.size > 0
