"""What kernels a call is made of: for which problem each is compiled, and how many blocks it has.

Functions of shapes and dtypes alone. Where there is no kernel for a problem, the plan is None.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import numpy as np

from jax_roipool._backends.rectangle_max.portable import INDEX_LIMIT

ELEMENTS = {
    "float32": "Float32",
    "float64": "Float64",
    "bfloat16": "Bfloat16",
    "float16": "Float16",
    "int8": "Integer<signed char>",
    "int16": "Integer<short>",
    "int32": "Integer<int>",
    "int64": "Integer<long long>",
    "uint8": "Integer<unsigned char>",
    "uint16": "Integer<unsigned short>",
    "uint32": "Integer<unsigned>",
    "uint64": "Integer<unsigned long long>",
}
THREADS = 256
MAX_ITEMS = 8 * THREADS  # of a block: large rows of bins are shared among several
VECTOR_BYTES, MAX_VECTOR = 16, 8
WARP = 32
# Maxima of windows of cells are made first where bins can be large, or where they are many.
CELLS_A_BIN = 128  # of a map
BINS_A_CELL = 8
LARGEST_WINDOW = 16  # whose cells are numbered by a byte
BAND = 16
WINDOW_BYTES = 128  # of a row of a window, that a thread has in its registers several times


class Tiling(NamedTuple):
    """How the gradient is shared out: tiles of cells to blocks, channels to their warps."""

    rows: int
    columns: int
    vector: int  # channels of a lane, if they divide
    in_registers: bool
    warps: int  # of a block, at most
    at_once: int


FEW_CELLS = Tiling(2, 2, vector=2, in_registers=True, warps=4, at_once=3)
MANY_CELLS = Tiling(4, 8, vector=1, in_registers=False, warps=8, at_once=6)
SHARED_BYTES = 34 << 10  # of a block for its sums; a T4 has 64 KB for all blocks at once


class Problem(NamedTuple):
    """Features `[G, n, H, W, C]`, and K RoIs of P x Q bins in each of the G groups."""

    G: int
    n: int
    H: int
    W: int
    C: int
    K: int
    P: int
    Q: int

    @property
    def bins(self) -> int:
        """Of all RoIs."""
        return self.G * self.K * self.P * self.Q

    @property
    def bins_can_be_large(self) -> bool:
        """As those of a RoI as large as the map."""
        return self.H * self.W >= CELLS_A_BIN * self.P * self.Q


class Kernel(NamedTuple):
    """A kernel to compile and launch."""

    source: str  # a file in kernels/
    element: str  # the name of the dtype
    macros: tuple[tuple[str, str], ...]  # without KERNEL, its name
    blocks: int
    threads: int

    @property
    def name(self) -> str:
        """Another for all that is compiled otherwise.

        XLA keeps loaded kernels by the address of their text, where another may lie later on. With
        a name of its own, that one is then not found, instead of the wrong kernel launched.
        """
        digest = hashlib.sha256(repr((self.source, self.macros)).encode()).hexdigest()
        return f"jax_roipool_{self.source.removesuffix('.cu')}_{self.element}_{digest[:12]}"


class MaximaPlan(NamedTuple):
    """The kernels of a `rectangle_max`."""

    pool: Kernel
    make_windows: Kernel | None
    windows: tuple[int, int]  # of an image: rows and columns


def rectangle_max(
    problem: Problem,
    dtype: np.dtype,
    argmax_dtype: np.dtype | None,
    *,
    empty_is_least: bool,
    window: int | None = None,
) -> MaximaPlan | None:
    """The plan for maxima; with windows of that side, or of the side that can pay."""
    window = worthwhile_window(problem) if window is None else window
    vector = _vector(problem.C, dtype)
    vectors = problem.C // vector
    items = min(max(problem.Q * vectors, THREADS), MAX_ITEMS)
    of_maxima = {"WITH_ARGMAX": int(argmax_dtype is not None), "WINDOW": window}
    argmax_dtype = argmax_dtype or np.dtype(np.int32)
    pool = _kernel(
        "rectangle_max.cu",
        dtype,
        {
            **_macros(problem, dtype, argmax_dtype, vector, THREADS),
            **of_maxima,
            "ITEMS": items,
            "EMPTY_IS_LEAST": int(empty_is_least),
        },
        blocks=math.ceil(problem.bins * vectors / items),
    )
    if not window:
        return MaximaPlan(pool, None, (0, 0)) if _fits(pool) else None
    rows, columns = problem.H - window + 1, problem.W - window + 1
    registers = max(dtype.itemsize, 4)  # bytes of an element there
    vector = min(vector, max(WINDOW_BYTES // (window * registers), 1))
    threads = problem.G * problem.n * math.ceil(rows / BAND) * columns * (problem.C // vector)
    make_windows = _kernel(
        "windows.cu",
        dtype,
        {**_macros(problem, dtype, argmax_dtype, vector, THREADS), **of_maxima, "BAND": BAND},
        blocks=math.ceil(threads / THREADS),
    )
    plan = MaximaPlan(pool, make_windows, (rows, columns))
    return plan if _fits(pool, make_windows) else None


def worthwhile_window(problem: Problem) -> int:
    """The side of windows: about the root of the longest bins', so that they take few of any size.

    0 where bins are small, and few beside the map's cells.
    """
    cells = problem.G * problem.n * problem.H * problem.W
    if not problem.bins_can_be_large and problem.bins < BINS_A_CELL * cells:
        return 0
    side = min(math.ceil(problem.H / problem.P), math.ceil(problem.W / problem.Q))
    window = min(2 ** round(math.log2(side) / 2), LARGEST_WINDOW)
    return window if window > 1 else 0


def scatter_at_argmax(
    problem: Problem,
    dtype: np.dtype,
    argmax_dtype: np.dtype,
    *,
    tiling: Tiling | None = None,
) -> Kernel | None:
    """The plan for gradients; shared out so, or as suits bins as large as they can be."""
    is_integer = np.issubdtype(dtype, np.integer)
    if is_integer or problem.K * problem.P * problem.Q >= INDEX_LIMIT:
        return None
    if tiling is None:
        tiling = MANY_CELLS if problem.bins_can_be_large else FEW_CELLS
    vector = math.gcd(problem.C, tiling.vector)
    slices = math.ceil(problem.C / vector / WARP)
    tiles = math.ceil(problem.H / tiling.rows) * math.ceil(problem.W / tiling.columns)
    sum_bytes = max(dtype.itemsize, 4)
    warps = min(slices, tiling.warps)
    if not tiling.in_registers:
        sums = tiling.rows * tiling.columns * vector * WARP * sum_bytes  # of a warp, in bytes
        warps = min(warps, max(SHARED_BYTES // sums, 1))
    macros = {
        **_macros(problem, dtype, argmax_dtype, vector, warps * WARP),
        "TILE_ROWS": tiling.rows,
        "TILE_COLS": tiling.columns,
        "SUM": "double" if sum_bytes > 4 else "float",
        "IN_REGISTERS": int(tiling.in_registers),
        "AT_ONCE": tiling.at_once,
    }
    blocks = problem.G * problem.n * tiles * math.ceil(slices / warps)
    kernel = _kernel("scatter_at_argmax.cu", dtype, macros, blocks)
    return kernel if _fits(kernel) else None


def _vector(channels: int, dtype: np.dtype) -> int:
    """The largest power of two that divides the channels and is loaded at once."""
    return math.gcd(channels, VECTOR_BYTES // dtype.itemsize, MAX_VECTOR)


def _macros(
    problem: Problem, dtype: np.dtype, argmax_dtype: np.dtype, vector: int, threads: int
) -> dict[str, object]:
    # An index of a block may be past the last vector.
    wide_count = problem.bins * (problem.C // vector) + MAX_ITEMS >= INDEX_LIMIT
    wide_offset = problem.H * problem.W * problem.C >= INDEX_LIMIT
    return {
        "GROUPS": problem.G,
        "IMAGES": problem.n,
        "HEIGHT": problem.H,
        "WIDTH": problem.W,
        "CHANNELS": problem.C,
        "ROIS": problem.K,
        "BIN_ROWS": problem.P,
        "BIN_COLS": problem.Q,
        "ELEMENT": ELEMENTS[dtype.name],
        "ARGMAX": "short" if argmax_dtype == np.int16 else "int",
        "VECTOR": vector,
        "THREADS": threads,
        "COUNT": "Long" if wide_count else "unsigned",
        "OFFSET": "Long" if wide_offset else "int",
    }


def _kernel(source: str, dtype: np.dtype, macros: dict[str, object], blocks: int) -> Kernel:
    macros_as_text = tuple((name, str(value)) for name, value in macros.items())
    return Kernel(source, dtype.name, macros_as_text, blocks, int(str(macros["THREADS"])))


def _fits(*kernels: Kernel) -> bool:
    return all(kernel.blocks < INDEX_LIMIT for kernel in kernels)
