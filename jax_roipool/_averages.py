"""What the averages over RoIs have in common: from arguments to a weighted sum of cells."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jax_roipool._backends.weighted_sum import FAMILY
from jax_roipool._explicit_axes import call_in_explicit_mode
from jax_roipool._rois import (
    FLOAT_DTYPES,
    canonical_features,
    canonical_onto,
    canonical_rois,
    check_arguments,
    check_output_size,
)
from jax_roipool._taps import Taps, split_bins
from jax_roipool._weighted_sum import weighted_sum


def average(
    make_taps: Callable,
    features: ArrayLike,
    rois: ArrayLike,
    output_size: int | tuple[int, int],
    spatial_scale: ArrayLike,
    *,
    image_index: ArrayLike | None,
    roi_mask: ArrayLike | None,
    implementation: str | None,
    features_spec: PartitionSpec | None,
    rois_have_gradient: bool = False,
    position_sensitive: bool = False,
    **options,
) -> jax.Array:
    """Features over the taps of `make_taps(image_index, cells, (P, Q), (H, W), **options)`.

    The options are hashable. With `position_sensitive` each bin pools channels of its own. See
    `jax_roipool.roi_align` for the other arguments.
    """
    arguments = check_arguments(
        features,
        rois,
        spatial_scale,
        image_index=image_index,
        roi_mask=roi_mask,
        dtypes=FLOAT_DTYPES,
    )
    FAMILY.check_name(implementation)
    output_size = check_output_size(output_size)
    if position_sensitive and arguments.features.shape[-1] % math.prod(output_size):
        raise ValueError(
            f"features must have P * Q = {math.prod(output_size)} channels for each one that is "
            f"pooled, got {arguments.features.shape[-1]} channels and an output_size of "
            f"{output_size}"
        )
    return _average(
        *arguments,
        make_taps=make_taps,
        output_size=output_size,
        options=tuple(options.items()),
        implementation=implementation,
        features_spec=features_spec,
        rois_have_gradient=rois_have_gradient,
        position_sensitive=position_sensitive,
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        *("make_taps", "output_size", "options"),
        *("implementation", "features_spec", "rois_have_gradient", "position_sensitive"),
    ),
)
def _average(*arguments, features_spec, **statics):
    pool = functools.partial(_average_canonical, **statics)
    if features_spec is None:
        return pool(*arguments)
    return call_in_explicit_mode(pool, features_spec, *arguments)


def _average_canonical(
    features: jax.Array,
    rois: jax.Array,
    image_index: jax.Array | None,
    roi_mask: jax.Array | None,
    spatial_scale: jax.Array,
    onto: jax.Array | None,
    *,
    make_taps: Callable,
    output_size: tuple[int, int],
    options: tuple,
    implementation: str | None,
    rois_have_gradient: bool,
    position_sensitive: bool,
) -> jax.Array:
    spatial_scale = lax.stop_gradient(spatial_scale)
    if not rois_have_gradient:
        rois = lax.stop_gradient(rois)
    maps = canonical_features(features, rois)
    _, images, H, W, _ = maps.shape
    index, cells = canonical_rois(rois, image_index, roi_mask, spatial_scale, images)
    taps = make_taps(index, cells, output_size, (H, W), **dict(options))
    if position_sensitive:
        pooled = _pool_own_channels(maps, taps, implementation)
    else:
        pooled = weighted_sum(maps, taps, implementation, canonical_onto(onto, rois))
    return pooled.reshape(*rois.shape[:-1], *pooled.shape[2:])


def _pool_own_channels(maps: jax.Array, taps: Taps, implementation: str | None) -> jax.Array:
    """Channel `(c * P + p) * Q + q` to channel `c` of bin `(p, q)`: a group of maps a bin."""
    G, n, H, W, channels = maps.shape
    P, Q = taps.rows.shape[2], taps.columns.shape[2]
    C = channels // (P * Q)
    of_bins = jnp.moveaxis(maps.reshape(G, n, H, W, C, P, Q), (5, 6), (1, 2))
    pooled = weighted_sum(of_bins.reshape(G * P * Q, n, H, W, C), split_bins(taps), implementation)
    return jnp.moveaxis(pooled.reshape(G, P, Q, -1, C), 3, 1)
