"""How a kernel gets into a program: XLA launches PTX by itself, in a custom call of its own.

The target is internal to XLA, and there from jaxlib 0.8.0 on. Should it go, this file is what knows
of it; `tests/test_cuda_compiled.py` will say so first.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from jax_roipool._backends.rectangle_max.cuda import nvrtc
from jax_roipool._backends.rectangle_max.cuda.plans import Kernel

TARGET = "__gpu$xla.gpu.ptx"


def call(
    kernel: Kernel, results: Sequence[jax.ShapeDtypeStruct], *operands: jax.Array
) -> list[jax.Array]:
    """The kernel's results; it gets pointers to the operands, and after them to the results."""
    launch = {
        "name": kernel.name,
        "kernel_type": "ptx",
        "kernel_data": nvrtc.ptx(kernel),
        "grid_x": kernel.blocks,
        "block_x": kernel.threads,
        "shared_mem_bytes": 0,
        **dict.fromkeys(("grid_y", "grid_z", "block_y", "block_z"), 1),
    }
    launch = {k: np.int32(v) if isinstance(v, int) else v for k, v in launch.items()}
    return list(jax.ffi.ffi_call(TARGET, results)(*operands, **launch))
