"""The TPU backend: Pallas kernels for maxima and for their gradient.

They take float32 and bfloat16, in any shape whose blocks fit a TPU's memories; the portable backend
serves the rest, and the tangent.
"""

from __future__ import annotations

import jax.numpy as jnp

from jax_roipool._backends import dense


def rectangle_max(
    features, image_index, *edges, argmax_dtype, empty_value, interpret=False
):
    """See `jax_roipool._rectangle_max`: maxima, and argmaxes if asked for, `[G, K, P, Q, C]`."""
    rectangles = (image_index, *edges)
    options = {"argmax_dtype": argmax_dtype, "empty_value": empty_value}
    groups, images, *_ = features.shape
    rois, bin_rows, bin_cols = *edges[0].shape[1:], edges[2].shape[2]
    if _kernel_takes(features) and rois > 0:
        from jax_roipool._backends.tpu import pool, schedule

        blocks = pool.blocks(features, bin_rows, bin_cols)
        if blocks and schedule.fits_smem(groups, images, rois, blocks):
            return pool.rectangle_max(features, rectangles, blocks, interpret=interpret, **options)
    return dense.rectangle_max(features, *rectangles, **options)


def scatter_at_argmax(cotangent, argmax, *rectangles, map_shape, interpret=False):
    """Each cotangent added at its argmax, none where it is -1: `[G, n, H, W, C]`."""
    if _kernel_takes(cotangent) and map_shape[0] > 0:
        from jax_roipool._backends.tpu import scatter, schedule

        groups, rois, *_ = cotangent.shape
        blocks = scatter.blocks(cotangent, map_shape)
        if blocks and schedule.fits_smem(groups, map_shape[0], rois, blocks):
            return scatter.scatter_at_argmax(
                cotangent, argmax, rectangles, blocks, map_shape=map_shape, interpret=interpret
            )
    return dense.scatter_at_argmax(cotangent, argmax, *rectangles, map_shape=map_shape)


gather_at_argmax = dense.gather_at_argmax


def _kernel_takes(array) -> bool:
    return array.dtype in (jnp.float32, jnp.bfloat16) and array.size > 0


def what_keeps_it_from_use() -> str | None:
    """None: the kernels are compiled with the program."""
    return None
