"""What the averages over RoIs have in common: from arguments to a weighted sum of cells."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jax_roipool._backends.weighted_sum import FAMILY
from jax_roipool._explicit_axes import call_in_explicit_mode
from jax_roipool._rois import (
    FLOAT_DTYPES,
    canonical_features,
    canonical_rois,
    check_arguments,
    check_output_size,
)
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
    **options,
) -> jax.Array:
    """Features over the taps of `make_taps(image_index, cells, (P, Q), (H, W), **options)`.

    The options are hashable. See `jax_roipool.roi_align` for the other arguments.
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
    return _average(
        *arguments,
        make_taps=make_taps,
        output_size=check_output_size(output_size),
        options=tuple(options.items()),
        implementation=implementation,
        features_spec=features_spec,
        rois_have_gradient=rois_have_gradient,
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        *("make_taps", "output_size", "options"),
        *("implementation", "features_spec", "rois_have_gradient"),
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
    *,
    make_taps: Callable,
    output_size: tuple[int, int],
    options: tuple,
    implementation: str | None,
    rois_have_gradient: bool,
) -> jax.Array:
    if not rois_have_gradient:
        rois, spatial_scale = lax.stop_gradient((rois, spatial_scale))
    maps = canonical_features(features, rois)
    _, images, H, W, _ = maps.shape
    index, cells = canonical_rois(rois, image_index, roi_mask, spatial_scale, images)
    taps = make_taps(index, cells, output_size, (H, W), **dict(options))
    pooled = weighted_sum(maps, taps, implementation)
    return pooled.reshape(*rois.shape[:-1], *pooled.shape[2:])
