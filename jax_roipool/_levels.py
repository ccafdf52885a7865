"""Feature pyramids: a level for each RoI, and any operator here on the levels of a pyramid."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_roipool._partitioning import choose
from jax_roipool._pr_roi_pool import pr_roi_pool
from jax_roipool._roi_align import roi_align
from jax_roipool._roi_average_pool import roi_average_pool
from jax_roipool._roi_pool import roi_pool
from jax_roipool._rois import (
    MaskOnto,
    as_array,
    check_mask,
    check_one_a_roi,
    check_rois,
    describe,
    split_alike,
)

TAKE_ONTO = (roi_pool, roi_align, roi_average_pool, pr_roi_pool)
"""Operators that can write a level's RoIs into what the other levels gave: see `MaskOnto`."""

INFINITY_BITS = 0x7F800000  # of float32, as are the bits of all smaller numbers below


def assign_levels(
    rois: ArrayLike,
    spatial_scales: Sequence[float],
    *,
    canonical_size: float = 224,
    canonical_level: int = 4,
) -> jax.Array:
    """Level of a feature pyramid for every region of interest (RoI), by its area.

    A RoI of `canonical_size` squared belongs to level `canonical_level`, of which the scale is
    2**-canonical_level, one twice as large to the next: k = floor(canonical_level +
    log2(sqrt(width * height) / canonical_size) + 1e-6), kept within the levels that there are.

    Args:
      rois: as `jax_roipool.roi_pool` takes them, `[K, 4]`, `[N, K, 4]` or `[R, 5]`, in pixels of
        the image.
      spatial_scales: the scale of every level, finest first, each half of the one before and a
        power of two: `(1/4, 1/8, 1/16, 1/32)` for levels 2 to 5. Python or NumPy numbers.
      canonical_size: in pixels of the image.
      canonical_level: an int.

    Returns:
      int32, `[K]`, `[N, K]` or `[R]`: an index into `spatial_scales`. It is -1 where one side
      alone is inverted, which makes the area negative, and where a coordinate is not finite.

    Raises:
      TypeError: RoIs that are no numbers, or scales or canonical values of a wrong type.
      ValueError: another shape of RoIs, scales that are no pyramid, or a canonical size that is not
        positive and finite.

    The formula is equation 1 of Lin et al., "Feature Pyramid Networks for Object Detection"
    (https://arxiv.org/abs/1612.03144). The 1e-6 and the steps that it makes in float32 are those of
    torchvision's `MultiScaleRoIAlign`. Areas are compared with the first one of each level, so that
    the level does not depend on a platform's logarithm.

    >>> from jax_roipool import assign_levels
    >>> rois = [[0, 0, 50, 60], [9, 9, 139, 149], [0, 0, 224, 224], [0, 0, 512, 448], [9, 0, 0, 9]]
    >>> assign_levels(rois, (1 / 4, 1 / 8, 1 / 16, 1 / 32))
    Array([ 0,  1,  2,  3, -1], dtype=int32)
    """
    rois = check_rois(rois)
    if rois.ndim not in (2, 3) or rois.shape[-1] not in ((4, 5) if rois.ndim == 2 else (4,)):
        raise ValueError(f"rois must be [K, 4], [N, K, 4] or [R, 5], got {describe(rois)}")
    levels = _check_pyramid(spatial_scales)
    size, level = _check_canonical(canonical_size, canonical_level)
    return _assign_levels(rois, tuple(_first_area(k, size, level) for k in levels[1:]))


@functools.partial(jax.jit, static_argnames="first_areas")
def _assign_levels(rois: jax.Array, first_areas: tuple[float, ...]) -> jax.Array:
    rois = split_alike(rois, rois)
    x1, y1, x2, y2 = corners = [rois[..., i].astype(jnp.float32) for i in range(-4, 0)]
    area = (x2 - x1) * (y2 - y1)
    real = functools.reduce(operator.and_, map(jnp.isfinite, corners)) & (area >= 0)
    levels = real.astype(jnp.int32) - 1
    for first_area in first_areas:
        levels += (real & (area >= first_area)).astype(jnp.int32)
    return levels


@functools.cache
def _first_area(level: int, canonical_size: np.float32, canonical_level: int) -> float:
    """The smallest area in float32 that torchvision's formula, in float32, gives the level."""

    def has_level(bits):
        with np.errstate(divide="ignore"):
            size = np.sqrt(np.uint32(bits).view(np.float32)) / canonical_size
            log2 = np.log2(size.astype(np.float64)).astype(np.float32)
        return np.floor(np.float32(canonical_level) + log2 + np.float32(1e-6)) >= level

    low, high = 0, INFINITY_BITS  # an infinite area has every level
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if has_level(middle) else (middle + 1, high)
    return float(np.uint32(low).view(np.float32))


def pool_levels(
    pool: Callable[..., jax.Array],
    features: Sequence[ArrayLike],
    rois: ArrayLike,
    *,
    spatial_scales: Sequence[ArrayLike],
    levels: ArrayLike | None = None,
    roi_mask: ArrayLike | None = None,
) -> jax.Array:
    """Regions of interest (RoIs) pooled each from its own level of a feature pyramid.

    Every level is pooled with a mask of the RoIs that are its own, which is exact, as those that
    are masked out pool to 0.

    Args:
      pool: an operator of this package with its arguments bound, such as
        `functools.partial(roi_align, output_size=7, sampling_ratio=2)`. It is called for each level
        with that level's features, the RoIs, `spatial_scale` and `roi_mask`. An `image_index`, for
        RoIs `[R, 4]`, is bound as well.
      features: a map for each level, all `[H, W, C]` or all `[N, H, W, C]`, which differ in H and W
        alone.
      rois: as the operator takes them, in the unit that all scales are for.
      spatial_scales: one for each level.
      levels: integer, `[K]`, `[N, K]` or `[R]`: the level of each RoI, an index into `features`. A
        RoI with any other number pools to 0 and passes no gradient. None for
        `assign_levels(rois, spatial_scales)`.
      roi_mask: bool, `[K]`, `[N, K]` or `[R]`: True for a real RoI, False for padding.

    Returns:
      What the operator returns for one level, `[K, P, Q, C]`, `[N, K, P, Q, C]` or `[R, P, Q, C]`.

    Raises:
      TypeError: an operator that cannot be called, features that are no sequence, levels that are
        not integers, and what the operator raises.
      ValueError: maps that do not go together, another number of scales than of maps, levels of
        another shape, a scale or a mask that is bound to the operator already, what `assign_levels`
        raises if levels are None, and what the operator raises.

    torchvision's `MultiScaleRoIAlign` is this with `roi_align`, a sampling ratio of 2 and
    `aligned=False`; detectron2's `ROIPooler` is this with the ratio that its configuration says.

    >>> import functools
    >>> import jax.numpy as jnp
    >>> from jax_roipool import pool_levels, roi_pool
    >>> features = [jnp.ones((64, 64, 1)), 2 * jnp.ones((32, 32, 1)), 3 * jnp.ones((16, 16, 1))]
    >>> rois = [[0, 0, 50, 60], [0, 0, 130, 140], [0, 0, 230, 230]]
    >>> pool = functools.partial(roi_pool, output_size=1)
    >>> pool_levels(pool, features, rois, spatial_scales=(1 / 4, 1 / 8, 1 / 16)).ravel()
    Array([1., 2., 3.], dtype=float32)
    """
    _check_pool(pool)
    rois = check_rois(rois)
    maps = _check_maps(features)
    if not hasattr(spatial_scales, "__len__"):
        raise TypeError(
            f"spatial_scales must be a sequence, one for each level, got {spatial_scales!r:.80}"
        )
    if len(spatial_scales) != len(maps):
        raise ValueError(
            f"spatial_scales must be one for each level, got {len(spatial_scales)} for "
            f"{len(maps)} maps"
        )
    if levels is None:
        levels = assign_levels(rois, spatial_scales)  # pyright: ignore[reportArgumentType]
    levels = _check_levels(levels, rois)
    roi_mask = check_mask(roi_mask, rois)
    if roi_mask is not None:
        levels = jnp.where(split_alike(roi_mask, rois), levels, -1)
    takes_onto = _takes_onto(pool)
    pooled = None
    for i, (features_of_level, scale) in enumerate(zip(maps, spatial_scales, strict=True)):
        own = levels == i
        mask = MaskOnto(own, pooled) if takes_onto and pooled is not None else own
        of_level = pool(features_of_level, rois, spatial_scale=scale, roi_mask=mask)
        if not isinstance(of_level, jax.Array):
            raise TypeError(f"pool must return one array, got {type(of_level).__name__}")
        joined = takes_onto or pooled is None
        pooled = of_level if joined else _join(own, of_level, pooled)
    assert pooled is not None
    return pooled


def _takes_onto(pool: Callable) -> bool:
    if not isinstance(pool, functools.partial) or pool.func not in TAKE_ONTO:
        return False
    # With a features_spec the call is made in another mode, which `onto` would be moved to.
    return pool.keywords.get("features_spec") is None


@jax.custom_jvp
def _join(own: jax.Array, of_level: jax.Array, pooled: jax.Array) -> jax.Array:
    """The level's own RoIs from it, all others as they were."""
    return choose(own, of_level, pooled)


@_join.defjvp
def _(primals, tangents):
    # One of them is 0. A sum hands its cotangent on, where a choice makes a copy for each level.
    _, of_level, pooled = tangents
    is_linear = jnp.issubdtype(primals[1].dtype, jnp.inexact)
    return _join(*primals), of_level + pooled if is_linear else pooled


def _check_pool(pool: Callable) -> None:
    if not callable(pool):
        raise TypeError(
            "pool must be an operator with its arguments bound, such as "
            f"functools.partial(roi_pool, output_size=7), got a {type(pool).__name__}"
        )
    bound = pool.keywords if isinstance(pool, functools.partial) else {}
    for name in ("spatial_scale", "roi_mask"):
        if name in bound:
            raise ValueError(
                f"pool must not have a {name} bound, as it gets another one for each level; give "
                f"pool_levels the {name if name == 'roi_mask' else 'spatial_scales'}"
            )
    _check_call(pool)


def _check_call(pool: Callable) -> None:
    """Raises TypeError unless the operator can be called as it will be."""
    try:
        signature = inspect.signature(pool)
    except (TypeError, ValueError):
        return  # it does not say
    try:
        signature.bind(None, None, spatial_scale=None, roi_mask=None)
    except TypeError as error:
        raise TypeError(
            "pool must be an operator with its other arguments bound, such as "
            "functools.partial(roi_align, output_size=7), as it is called as pool(features, rois, "
            f"spatial_scale=..., roi_mask=...), got one for which this is an error: {error}; in "
            "the place of a layer, use MultiScaleRoIAlign"
        ) from error


def _check_maps(features: Sequence[ArrayLike]) -> list[jax.Array]:
    if not isinstance(features, (list, tuple)):
        in_order = "[features[name] for name in names], finest first"
        hint = in_order if isinstance(features, dict) else "a list of them"
        raise TypeError(
            f"features must be a list or tuple of maps, one for each level, got "
            f"{type(features).__name__}; give {hint}"
        )
    maps = [as_array("features", x) for x in features]
    alike = {(x.dtype, x.ndim, x.shape[:-3], x.shape[-1:]) for x in maps}
    if len(alike) != 1:
        raise ValueError(
            "features must be at least one map, all of one dtype and of shapes that differ in H "
            f"and W alone, got {', '.join(map(describe, maps)) or 'none'}"
        )
    return maps


def _check_levels(levels: ArrayLike, rois: jax.Array) -> jax.Array:
    levels = as_array("levels", levels)
    if not jnp.issubdtype(levels.dtype, jnp.integer):
        raise TypeError(
            f"levels must be of an integer dtype, indices into features, got {describe(levels)}"
        )
    check_one_a_roi("levels", levels, rois)
    return split_alike(levels, rois)


def _check_pyramid(spatial_scales: Sequence[float]) -> range:
    """The levels of those scales: k for a scale of 2**-k."""
    expected = (
        "spatial_scales must be powers of two, finest first and each half of the one before, such "
        "as (1/4, 1/8, 1/16, 1/32)"
    )
    try:
        scales = [float(scale) for scale in spatial_scales]
    except TypeError as error:
        raise TypeError(
            f"{expected}, numbers that are known when a program is traced, got {spatial_scales}"
        ) from error
    first = round(-math.log2(scales[0])) if scales and 0 < scales[0] < math.inf else 0
    levels = range(first, first + len(scales))
    if not scales or scales != [2.0**-k for k in levels]:
        raise ValueError(
            f"{expected}, got {scales}; for any other pyramid, choose the levels and give them to "
            "pool_levels"
        )
    return levels


def _check_canonical(canonical_size: float, canonical_level: int) -> tuple[np.float32, int]:
    try:
        level = operator.index(canonical_level)
    except TypeError as error:
        raise TypeError(f"canonical_level must be an int, got {canonical_level!r:.40}") from error
    if not isinstance(canonical_size, numbers.Real):
        raise TypeError(f"canonical_size must be a number, got {canonical_size!r:.40}")
    if not 0 < np.float32(canonical_size) < np.inf:
        raise ValueError(f"canonical_size must be positive and finite, got {canonical_size!r:.40}")
    return np.float32(canonical_size), level
