"""The gather and the scatter at the argmax by indexing, for the backends that have no other way."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from jax_roipool._backends.rectangle_max.portable import INDEX_LIMIT, has_image, split_edges
from jax_roipool._backends.sums import sum_dtype


def gather_at_argmax(features, argmax, edges):
    """See `jax_roipool._backends.rectangle_max`."""
    if 0 in features.shape:
        return [jnp.zeros(argmax.shape, features.dtype)]
    images = features.shape[1]
    found, image, cell = _cells(argmax, edges, images)

    def gather_group(features, image, cell):
        cells = features.reshape(images, -1, features.shape[-1])
        return cells[image, cell, _channel_of(cell)]

    image = jnp.clip(image, 0, images - 1)
    return [jnp.where(found, jax.vmap(gather_group)(features, image, cell), 0)]


def scatter_at_argmax(cotangent, argmax, edges, *, map_shape):
    """See `jax_roipool._backends.rectangle_max`.

    On a GPU XLA adds in no fixed order, unless `--xla_gpu_deterministic_ops` is among its flags.
    """
    groups, *bins, channels = cotangent.shape
    shape = (groups, *map_shape, channels)
    if 0 in shape or cotangent.size == 0:
        return [jnp.zeros(shape, cotangent.dtype)]
    images, height, width = map_shape
    cells = (images, height * width, channels)
    dtype = sum_dtype(cotangent)
    found, image, cell = _cells(argmax, edges, images)
    # What has no cell adds 0 to any, each to another one, as additions to one would wait for each
    # other. An index out of bounds would do, but for that flag: with it XLA adds it elsewhere.
    cotangent = jnp.where(found, cotangent, 0)
    any_cell = jnp.arange(math.prod(bins), dtype=jnp.int32).reshape(*bins, 1) % (height * width)
    cell = jnp.where(found, cell, any_cell)
    image = jnp.clip(image, 0, images - 1)

    def scatter_group(cotangent, image, cell):
        index = (image, cell, _channel_of(cell))
        sums = jnp.zeros(cells, dtype)
        size = math.prod(cells)
        if not is_symbolic_dim(size) and size < INDEX_LIMIT:
            # One index instead of three: on a CPU faster, and with little over half the memory.
            index = (index[0] * math.prod(cells[1:]) + index[1] * channels + index[2],)
            sums = sums.reshape(-1)
        return sums.at[index].add(cotangent.astype(dtype))

    sums = jax.vmap(scatter_group)(cotangent, image, cell)
    return [sums.reshape(shape).astype(cotangent.dtype)]


def _cells(argmax, edges, images):
    """Whether each argmax is a cell of an image, that image `[G, K, 1, 1, 1]`, and the cell, or 0.

    The argmax is `[G, K, P, Q, C]`, and so are the first and the last result.
    """
    image_index, *_ = split_edges(edges, argmax.shape[2:4])
    image = image_index[:, :, None, None, None]
    found = has_image(image, images) & (argmax >= 0)
    return found, image, jnp.where(found, argmax, 0).astype(jnp.int32)


def _channel_of(bins):
    return lax.broadcasted_iota(jnp.int32, bins.shape, bins.ndim - 1)
