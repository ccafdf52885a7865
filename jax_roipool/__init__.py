"""Region-of-interest (RoI) pooling for JAX and Flax: maxima and averages."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from jax_roipool._backends.native import register_custom_calls
from jax_roipool._backends.rectangle_max import CUSTOM_CALLS
from jax_roipool._bins import CONVENTIONS, Convention
from jax_roipool._crop_and_resize import crop_and_resize
from jax_roipool._levels import assign_levels, pool_levels
from jax_roipool._pr_roi_pool import pr_roi_pool
from jax_roipool._ps_roi import ps_roi_align, ps_roi_pool
from jax_roipool._roi_align import roi_align
from jax_roipool._roi_average_pool import roi_average_pool
from jax_roipool._roi_pool import roi_pool, roi_pool_with_argmax

if TYPE_CHECKING:
    from jax_roipool import linen, nnx
    from jax_roipool.linen import MultiScaleRoIAlign, RoIAlign, RoIPool

__all__ = [
    "CONVENTIONS",
    "CUSTOM_CALLS",
    "Convention",
    "MultiScaleRoIAlign",
    "RoIAlign",
    "RoIPool",
    "assign_levels",
    "crop_and_resize",
    "linen",
    "nnx",
    "pool_levels",
    "pr_roi_pool",
    "ps_roi_align",
    "ps_roi_pool",
    "register_custom_calls",
    "roi_align",
    "roi_average_pool",
    "roi_pool",
    "roi_pool_with_argmax",
]

__version__ = "0.1.0"


def __getattr__(name: str):
    # Flax takes about a second to import; only those who use its modules should wait for it.
    if name in ("linen", "nnx"):
        return importlib.import_module(f"jax_roipool.{name}")
    if name in ("MultiScaleRoIAlign", "RoIAlign", "RoIPool"):
        return getattr(importlib.import_module("jax_roipool.linen"), name)
    raise AttributeError(f"module 'jax_roipool' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
