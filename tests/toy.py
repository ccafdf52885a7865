"""A primitive of twenty lines, declared as the library's are: what `_primitive.py` gives to any.

`scale`: each RoI's image, times the RoI's weight; `total`: each image's sum of what its RoIs have.
"""

import jax.numpy as jnp

from jax_roipool._backends import Backend, Family
from jax_roipool._primitive import Declaration, DeclaredPrimitive


def scale(images, packed, *, dtype):
    index, weight = packed[..., 0], packed[..., 1]
    n = images.shape[1]
    picked = jnp.take_along_axis(images, jnp.clip(index, 0, n - 1)[..., None], axis=1)
    found = (index >= 0) & (index < n)
    values = jnp.where(found[..., None], picked * weight[..., None], 0).astype(dtype)
    return [values, jnp.where(found[..., None], values > 0, False).astype(jnp.int32) - 1]


def total(values, packed, *, num_images):
    one_hot = packed[..., 0][:, None, :] == jnp.arange(num_images[0])[None, :, None]
    return [jnp.einsum("gnk,gkc->gnc", one_hot.astype(values.dtype), values)]


def refuse(*operands, **params):
    raise AssertionError("this backend is not to be lowered here")


FAMILY = Family(
    backends=(
        Backend("fast", {"scale": refuse, "total": refuse}, frozenset({"tpu"})),
        Backend("broken", {}, frozenset({"cuda"}), lambda: "it is broken"),
        Backend("plain", {"scale": scale, "total": total}, is_partitionable=True),
    ),
    kernels={"tpu": ("fast",), "cuda": ("broken",)},
    portable={"*": ("plain",)},
)

scale_p = DeclaredPrimitive(
    Declaration(
        "scale",
        "gnc, gke -> gkc",
        FAMILY,
        result_dtypes=lambda _, *, dtype: [dtype, jnp.int32],
        packed_index=1,
        absent=(0, -1),
    )
)
total_p = DeclaredPrimitive(
    Declaration(
        "total",
        "gkc, gke -> gnc",
        FAMILY,
        result_dtypes=lambda values_dtype, **_: [values_dtype],
        sizes=("n", "num_images"),
        packed_index=1,
    )
)


def apply_scale(images, packed, implementation=None):
    return scale_p(images, packed, dtype=jnp.dtype(jnp.float32), implementation=implementation)


def apply_total(values, packed, num_images, implementation=None):
    return total_p(values, packed, num_images=(num_images,), implementation=implementation)
