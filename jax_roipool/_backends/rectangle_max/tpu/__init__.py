"""The TPU backend: Pallas kernels for maxima and for their gradient.

They take float32 and bfloat16, in any shape whose blocks fit a TPU's memories; the dense backend
serves the rest, and the tangent.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_roipool._backends.rectangle_max import dense


def rectangle_max(features, edges, *, output_size, argmax_dtype, empty_value, interpret=False):
    """See `jax_roipool._backends.rectangle_max`."""
    options = {
        "output_size": output_size,
        "argmax_dtype": argmax_dtype,
        "empty_value": empty_value,
    }
    if _can_be_taken(features) and 0 not in (edges.shape[1], *output_size):
        # Pallas takes a tenth of a second to import.
        from jax_roipool._backends.rectangle_max.tpu import pool

        blocks = pool.blocks(features, edges.shape[1], output_size)
        if blocks is not None:
            return pool.rectangle_max(features, edges, blocks, interpret=interpret, **options)
    return dense.rectangle_max(features, edges, **options)


gather_at_argmax = dense.gather_at_argmax


def scatter_at_argmax(cotangent, argmax, edges, *, map_shape, interpret=False):
    """See `jax_roipool._backends.rectangle_max`."""
    if _can_be_taken(cotangent) and 0 not in map_shape:
        from jax_roipool._backends.rectangle_max.tpu import scatter

        blocks = scatter.blocks(cotangent, map_shape)
        if blocks is not None:
            return scatter.scatter_at_argmax(
                cotangent, argmax, edges, blocks, map_shape=map_shape, interpret=interpret
            )
    return dense.scatter_at_argmax(cotangent, argmax, edges, map_shape=map_shape)


def _can_be_taken(array) -> bool:
    if jax.config.jax_enable_x64 and jax.__version_info__ < (0, 10):  # pyright: ignore
        return False  # Pallas recurses without end
    return array.dtype in (jnp.float32, jnp.bfloat16) and array.size > 0
