"""Region-of-interest pooling for JAX."""

from jax_roipool._bins import CONVENTIONS, Convention
from jax_roipool._roi_pool import roi_pool, roi_pool_with_argmax

__version__ = "0.1.0"
