"""RoI max pooling: from features and RoIs to bins' maxima."""

from __future__ import annotations

import functools

import jax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jax_roipool._backends.rectangle_max import FAMILY
from jax_roipool._bins import Convention, as_convention, packed_edges
from jax_roipool._explicit_axes import call_in_explicit_mode
from jax_roipool._rectangle_max import rectangle_max
from jax_roipool._rois import (
    canonical_features,
    canonical_onto,
    canonical_rois,
    check_arguments,
    check_output_size,
)


def roi_pool(
    features: ArrayLike,
    rois: ArrayLike,
    output_size: int | tuple[int, int],
    spatial_scale: ArrayLike = 1.0,
    *,
    image_index: ArrayLike | None = None,
    roi_mask: ArrayLike | None = None,
    convention: str | Convention = "partition",
    implementation: str | None = None,
    features_spec: PartitionSpec | None = None,
    forward_mode: bool = False,
) -> jax.Array:
    """Maximum of the features in each of P x Q bins of every region of interest (RoI).

    A RoI's coordinates, times `spatial_scale` and rounded half away from zero, give a rectangle
    of cells; the convention splits it into P x Q bins (see `jax_roipool.Convention`); each bin
    pools to the maximum of its cells inside the map. NaN is greater than any number. A bin's
    gradient goes whole to its maximum, the first in row-major order among equals.

    A RoI that `roi_mask` excludes, one with a coordinate that is not finite, and one whose image
    index names no image pool to 0 and pass no gradient. So do all if a traced `spatial_scale` is
    not finite.

    Args:
      features: `[H, W, C]` or `[N, H, W, C]`, floating (16 bits or more) or integer.
      rois: floating or integer, `(x1, y1, x2, y2)` in the last axis, in any unit of which
        `spatial_scale` makes cells, x along W and y along H:

        - `[K, 4]` with features `[H, W, C]`,
        - `[N, K, 4]` with features `[N, H, W, C]`, K RoIs for each image,
        - `[R, 5]` with features `[N, H, W, C]`, the index of its image before each RoI, or
        - `[R, 4]` with features `[N, H, W, C]` and an `image_index`.

        Coordinates are computed in float32 and kept within 2**29 cells of the origin.
      output_size: the number of bins, `(P, Q)` along H and W, or one int for both.
      spatial_scale: cells per unit of the coordinates, for example 1/16 for RoIs in pixels of an
        image of which the features have a stride of 16. A scalar; it may be traced.
      image_index: integer, `[R]`: the index of each RoI's image, for RoIs `[R, 4]`.
      roi_mask: bool, `[K]`, `[N, K]` or `[R]`: True for a real RoI, False for padding.
      convention: `"partition"`, `"torchvision"`, `"openvino"`, `"chainer"`, or a
        `jax_roipool.Convention`.
      implementation: None for the best that the platform has, `"xla"` for plain XLA, `"kernel"`
        for one written by hand, or an error. All give the same bits.
      features_spec: how the features are split over a mesh of automatic axes, such as
        `PartitionSpec("data")`, with which each device uses the kernel for its part even where
        automatic axes rule that out, as on TPUs. RoIs, masks and results are split like the batch.
        See docs/sharding.md; nothing is to be said of explicit axes.
      forward_mode: True for derivatives by `jax.jvp`, `jax.linearize` and `jax.jacfwd` as well,
        which a `jax.custom_vjp` does not have. Values and gradients are the same bits.

    Returns:
      `[K, P, Q, C]`, `[N, K, P, Q, C]` or `[R, P, Q, C]`, of the features' dtype.

    Raises:
      TypeError: a dtype that cannot be pooled, or that cannot be coordinates or a mask.
      ValueError: shapes that do not go together, an output size that is not positive, a Python or
        NumPy number for a scale that is not positive and finite, an unknown convention or
        implementation, an implementation that the platform cannot run, or a `features_spec` that
        names no axes of the mesh at hand.

    The operator is that of Girshick, "Fast R-CNN" (https://arxiv.org/abs/1504.08083), section
    2.1. The paper leaves the rounding of bins open; `convention` names how others have settled it.

    >>> import jax.numpy as jnp
    >>> from jax_roipool import roi_pool
    >>> features = jnp.arange(16.0).reshape(4, 4, 1)
    >>> roi_pool(features, jnp.array([[0, 0, 4, 4], [1, 1, 3, 4]]), 2)[..., 0]
    Array([[[ 5.,  7.],
            [13., 15.]],
    <BLANKLINE>
           [[ 5.,  6.],
            [13., 14.]]], dtype=float32)
    """
    (pooled,) = _checked_roi_pool(
        features,
        rois,
        spatial_scale,
        image_index=image_index,
        roi_mask=roi_mask,
        output_size=output_size,
        convention=convention,
        implementation=implementation,
        features_spec=features_spec,
        forward_mode=forward_mode,
        with_argmax=False,
    )
    return pooled


def roi_pool_with_argmax(
    features: ArrayLike,
    rois: ArrayLike,
    output_size: int | tuple[int, int],
    spatial_scale: ArrayLike = 1.0,
    *,
    image_index: ArrayLike | None = None,
    roi_mask: ArrayLike | None = None,
    convention: str | Convention = "partition",
    implementation: str | None = None,
    features_spec: PartitionSpec | None = None,
    forward_mode: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`roi_pool`, and the cell that each maximum came from.

    Arguments and errors are those of `jax_roipool.roi_pool`.

    Returns:
      The pooled features, and their argmax, int32 of the same shape: `row * W + column` in the
      RoI's own image, of the first maximum in row-major order (of the first NaN if there is one),
      or -1 where a bin has no cell or a RoI pools nothing.

    >>> import jax.numpy as jnp
    >>> from jax_roipool import roi_pool_with_argmax
    >>> pooled, argmax = roi_pool_with_argmax(
    ...     jnp.arange(16.0).reshape(4, 4, 1), jnp.array([[0, 0, 4, 4]]), 2
    ... )
    >>> argmax[0, ..., 0]
    Array([[ 5,  7],
           [13, 15]], dtype=int32)
    """
    pooled, argmax = _checked_roi_pool(
        features,
        rois,
        spatial_scale,
        image_index=image_index,
        roi_mask=roi_mask,
        output_size=output_size,
        convention=convention,
        implementation=implementation,
        features_spec=features_spec,
        forward_mode=forward_mode,
        with_argmax=True,
    )
    return pooled, argmax


def _checked_roi_pool(
    features,
    rois,
    spatial_scale,
    *,
    image_index,
    roi_mask,
    output_size,
    convention,
    implementation,
    **options,
):
    arguments = check_arguments(
        features, rois, spatial_scale, image_index=image_index, roi_mask=roi_mask
    )
    FAMILY.check_name(implementation)
    return _roi_pool(
        *arguments,
        output_size=check_output_size(output_size),
        convention=as_convention(convention),
        implementation=implementation,
        **options,
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        *("output_size", "convention", "implementation"),
        *("features_spec", "forward_mode", "with_argmax"),
    ),
)
def _roi_pool(*arguments, features_spec, **options):
    pool = functools.partial(_pool_canonical, **options)
    if features_spec is None:
        return pool(*arguments)
    return call_in_explicit_mode(pool, features_spec, *arguments)


def _pool_canonical(
    features: jax.Array,
    rois: jax.Array,
    image_index: jax.Array | None,
    roi_mask: jax.Array | None,
    spatial_scale: jax.Array,
    onto: jax.Array | None,
    *,
    output_size: tuple[int, int],
    convention: Convention,
    implementation: str | None,
    forward_mode: bool,
    with_argmax: bool,
) -> tuple[jax.Array, ...]:
    maps = canonical_features(features, rois)
    _, images, height, width, _ = maps.shape
    edges = packed_edges(
        *canonical_rois(rois, image_index, roi_mask, spatial_scale, images),
        output_size,
        (height, width),
        convention,
    )
    results = rectangle_max(
        maps,
        edges,
        output_size,
        with_argmax=with_argmax,
        empty_value=convention.empty_value,
        implementation=implementation,
        forward_mode=forward_mode,
        onto=canonical_onto(onto, rois),
    )
    return jax.tree.map(lambda x: x.reshape(*rois.shape[:-1], *x.shape[2:]), results)
