"""Arguments to canonical form: layouts, padding, spatial scale, and every check on them.

In canonical form there are G groups, each with n images and K RoIs that carry an image index
inside their group. Per-image RoIs are n = 1; flat `[R, 5]` RoIs are G = 1.
"""

from __future__ import annotations

import functools
import numbers
import operator
import reprlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.export import is_symbolic_dim
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jax_roipool._bins import MAX_BINS

CELL_LIMIT = 2.0**29
"""RoIs are kept within this many cells of the origin, where no int32 sum can overflow."""

FLOAT_DTYPES = ("float32", "bfloat16", "float16", "float64")
FEATURE_DTYPES = (
    *FLOAT_DTYPES,
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
)


_HINTS = {
    "rois": "pad lists of boxes to one length, with a roi_mask",
    "spatial_scale": "convert it by float()",
}


class Arguments(NamedTuple):
    """Arguments that passed every check, still in the layout they came in."""

    features: jax.Array
    rois: jax.Array
    image_index: jax.Array | None
    roi_mask: jax.Array | None
    spatial_scale: jax.Array
    onto: jax.Array | None  # see `MaskOnto`


class MaskOnto(NamedTuple):
    """A `roi_mask` that only `pool_levels` gives, and what those that are masked out pool to.

    That is 0 for all others, as it is of other levels of a pyramid, and has the result's shape.
    """

    roi_mask: jax.Array
    onto: jax.Array


class CanonicalRoIs(NamedTuple):
    """RoIs in cells. `image_index` is -1 for a RoI that pools nothing."""

    image_index: jax.Array  # int32 [G, K]
    cells: jax.Array  # float32 [G, K, 4], (x1, y1, x2, y2), finite and within +-CELL_LIMIT


def check_arguments(
    features: ArrayLike,
    rois: ArrayLike,
    spatial_scale: ArrayLike,
    *,
    image_index: ArrayLike | None,
    roi_mask: ArrayLike | MaskOnto | None,
    dtypes: Sequence[str] = FEATURE_DTYPES,
) -> Arguments:
    """Arrays of the arguments, or the error that says which of them cannot be right.

    `dtypes` are those that features can have.
    """
    features, rois = as_array("features", features), check_rois(rois)
    if features.dtype.name not in dtypes:
        raise TypeError(
            f"features must be of one of the dtypes {', '.join(dtypes)}, "
            f"got {describe(features)}; convert them, for example with .astype(jnp.float32)"
        )
    _check_layout(features, rois, has_image_index=image_index is not None)
    onto = None
    if isinstance(roi_mask, MaskOnto):
        roi_mask, onto = roi_mask
    return Arguments(
        features,
        rois,
        None if image_index is None else check_image_index(image_index, rois),
        check_mask(roi_mask, rois),
        _check_spatial_scale(spatial_scale),
        onto,
    )


def check_rois(rois: ArrayLike) -> jax.Array:
    """The array of them; its shape is another question."""
    # Lists, and NumPy's 64-bit integers, can hold what JAX without 64-bit types wraps or refuses.
    is_wide = isinstance(rois, np.ndarray) and rois.dtype in (np.int64, np.uint64)
    dtype = jnp.float32 if is_wide or isinstance(rois, (list, tuple)) else None
    rois = as_array("rois", rois, dtype)
    if not is_real(rois.dtype):
        raise TypeError(f"rois must be of a real floating or integer dtype, got {describe(rois)}")
    return rois


def _check_layout(features: jax.Array, rois: jax.Array, *, has_image_index: bool) -> None:
    got = f"got features {describe(features)} and rois {describe(rois)}"
    layouts = {
        (3, 2, 4, False): "[H, W, C] with [K, 4]",
        (4, 3, 4, False): "[N, H, W, C] with [N, K, 4]",
        (4, 2, 5, False): "[N, H, W, C] with [R, 5], the image index first",
        (4, 2, 4, True): "[N, H, W, C] with [R, 4] and an image_index [R]",
    }
    layout = (features.ndim, rois.ndim, rois.shape[-1] if rois.ndim else None, has_image_index)
    if layout not in layouts:
        got += f", {'and an' if has_image_index else 'without an'} image_index"
        raise ValueError(f"features and rois must be one of: {'; '.join(layouts.values())}; {got}")
    if rois.ndim == 3 and rois.shape[0] != features.shape[0]:
        raise ValueError(f"features [N, H, W, C] and rois [N, K, 4] must have one N, {got}")
    height, width = features.shape[-3:-1]
    if height == 0 or width == 0:
        raise ValueError(f"a feature map must have at least one cell, {got}")
    if not is_symbolic_dim(height * width) and height * width >= 2**31:
        raise ValueError(
            f"a feature map must have less than 2**31 cells, as argmax is int32, {got}"
        )


def check_image_index(
    image_index: ArrayLike, rois: jax.Array, name: str = "image_index", rois_name: str = "rois"
) -> jax.Array:
    """An array of the index of each RoI's image; the names are for its errors."""
    if isinstance(image_index, np.ndarray) and image_index.dtype in (np.int64, np.uint64):
        # What JAX would wrap into an image's index names no image either way.
        image_index = np.clip(image_index, -1, np.iinfo(np.int32).max).astype(np.int32)
    image_index = as_array(name, image_index)
    if not jnp.issubdtype(image_index.dtype, jnp.integer):
        raise TypeError(
            f"{name} must be of an integer dtype, got {describe(image_index)}; "
            "convert it by .astype(int)"
        )
    check_one_a_roi(name, image_index, rois, rois_name)
    return image_index


def check_mask(roi_mask: ArrayLike | None, rois: jax.Array) -> jax.Array | None:
    if roi_mask is None:
        return None
    roi_mask = as_array("roi_mask", roi_mask)
    if roi_mask.dtype != jnp.bool_:
        raise TypeError(
            f"roi_mask must be of dtype bool, True for a real RoI, got {describe(roi_mask)}"
        )
    check_one_a_roi("roi_mask", roi_mask, rois)
    return roi_mask


def check_one_a_roi(name: str, x: jax.Array, rois: jax.Array, rois_name: str = "rois") -> None:
    """Raises ValueError unless the array has an entry for each RoI."""
    if x.shape != rois.shape[:-1]:
        raise ValueError(
            f"{name} must have one entry a RoI, shape {list(rois.shape[:-1])} for {rois_name} "
            f"{describe(rois)}, got {describe(x)}"
        )


def _check_spatial_scale(spatial_scale: ArrayLike) -> jax.Array:
    if isinstance(spatial_scale, numbers.Real):
        number = _to_float32(spatial_scale)
        if not 0 < number < np.inf or isinstance(spatial_scale, bool):
            raise ValueError(
                "spatial_scale must be positive and finite in float32, cells per unit of the RoI "
                f"coordinates (1/16 for a stride of 16), got {spatial_scale!r:.40}"
            )
        spatial_scale = number
    spatial_scale = as_array("spatial_scale", spatial_scale)
    if not is_real(spatial_scale.dtype):
        raise TypeError(f"spatial_scale must be a real number, got {describe(spatial_scale)}")
    if spatial_scale.shape != ():
        raise ValueError(
            f"spatial_scale must be a scalar, got {describe(spatial_scale)}; "
            "scale the RoIs themselves, or jax.vmap over it, for a scale per image"
        )
    return spatial_scale.astype(jnp.float32)


def check_output_size(
    output_size: int | tuple[int, int], name: str = "output_size"
) -> tuple[int, int]:
    """`(P, Q)`, the bins along the rows and along the columns."""
    expected = f"{name} must be an int or a pair (P, Q) of ints from 1 to {MAX_BINS}"
    return check_pair(name, output_size, MAX_BINS, expected)


def check_pair(
    name: str, value: int | tuple[int, int], most: int, expected: str
) -> tuple[int, int]:
    """What an argument, an int from 1 on or a pair of them, says of rows and of columns."""
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if any(isinstance(number, Tracer) for number in pair):
        raise TypeError(
            f"{expected} that is known when a program is traced, as shapes depend on it, got "
            f"{value}; name it in jax.jit(..., static_argnames='{name}'), which wants "
            "a tuple for a pair, or fix it with functools.partial"
        )
    if len(pair) != 2 or any(isinstance(number, (bool, np.bool_)) for number in pair):
        raise ValueError(f"{expected}, got {value!r}")
    try:
        rows, columns = map(operator.index, pair)
    except TypeError as error:
        raise TypeError(f"{expected}, got {value!r}") from error
    if not (1 <= rows <= most and 1 <= columns <= most):
        raise ValueError(f"{expected}, got {value!r}")
    return rows, columns


def canonical_features(features: jax.Array, rois: jax.Array) -> jax.Array:
    """`[G, n, H, W, C]`."""
    if rois.ndim == 3:
        return features[:, None]
    return features[None, None] if features.ndim == 3 else features[None]


def canonical_onto(onto: jax.Array | None, rois: jax.Array) -> jax.Array | None:
    """`[G, K, P, Q, C]`."""
    return onto if onto is None or rois.ndim == 3 else onto[None]


def canonical_rois(
    rois: jax.Array,
    image_index: jax.Array | None,
    roi_mask: jax.Array | None,
    spatial_scale: jax.Array,
    images: int,
) -> CanonicalRoIs:
    """RoIs in cells, grouped; `images` is n, the number of images of a group."""
    rois = split_alike(rois, rois)
    image_index, roi_mask = (
        None if x is None else split_alike(x, rois) for x in (image_index, roi_mask)
    )
    if rois.ndim == 2:
        rois = rois[None]
        image_index, roi_mask = (None if x is None else x[None] for x in (image_index, roi_mask))
    coordinates = rois[..., -4:].astype(jnp.float32)
    # Not `all` over the axis: a reduction is a loop of its own in the program.
    is_finite = [jnp.isfinite(coordinates[..., i]) for i in range(4)]
    real = functools.reduce(operator.and_, is_finite) & jnp.isfinite(spatial_scale)
    if roi_mask is not None:
        real &= roi_mask
    if image_index is None and rois.shape[-1] == 5:
        image_index = rois[..., 0]
    if image_index is None:
        index = real.astype(jnp.int32) - 1  # a choice between constants would lose `real`'s mesh
    else:
        index = _widen(image_index)
        real &= (index >= 0) & (index < images)
        if jnp.issubdtype(index.dtype, jnp.floating):
            real &= index == jnp.floor(index)
        index = jnp.where(real, index, -1).astype(jnp.int32)
    cells = jnp.clip(coordinates * spatial_scale, -CELL_LIMIT, CELL_LIMIT)
    return CanonicalRoIs(index, jnp.where(real[..., None], cells, 0))


def split_alike(x: jax.Array, rois: jax.Array) -> jax.Array:
    """The array with what it has of each RoI on the RoI's device, where types say how they are.

    JAX would refuse to combine arrays that are split otherwise; to move these costs little.
    """
    sharding = jax.typeof(rois).sharding
    spec = (*sharding.spec[:-1], *[None] * (x.ndim + 1 - rois.ndim))
    if tuple(jax.typeof(x).sharding.spec) == spec or not (x is rois or any(spec)):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def _widen(index: jax.Array) -> jax.Array:
    """The image index in a dtype that the number of images can be compared in."""
    if index.dtype.itemsize >= 4:
        return index
    return index.astype(jnp.float32 if jnp.issubdtype(index.dtype, jnp.floating) else jnp.int32)


def _to_float32(number: numbers.Real) -> np.float32:
    try:
        with np.errstate(over="ignore"):
            return np.float32(float(number))
    except OverflowError:  # an int past every float
        return np.float32(np.inf)


def as_array(name: str, value: ArrayLike, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """The argument of that name as an array, or an error that names it."""
    try:
        return jnp.asarray(value, dtype)
    except OverflowError as error:
        got = reprlib.repr(value)
        raise ValueError(f"{name} must be numbers that 32 bits can hold, got {got}") from error
    except (TypeError, ValueError) as error:
        got = reprlib.repr(value)
        hint = f"; {_HINTS[name]}" if name in _HINTS else ""
        raise TypeError(f"{name} must be an array of numbers, got {got}{hint}") from error


def is_real(dtype: np.dtype) -> bool:
    """Whether it is one of floats or integers."""
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def describe(array: jax.Array) -> str:
    """Its type, as errors say it."""
    return f"{array.dtype}[{', '.join(map(str, array.shape))}]"
