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
MAX_LEVELS = 4
CELLS_A_BIN = 128  # of a map, from which on tiles can be worth making
WARP = 32
# Of the gradient, the largest first. With 8 x 8 cells a multiprocessor of a T4, which has 64 KB of
# shared memory, has room for 3 warps, with 4 x 8 for 7.
TILES = ((4, 8), (4, 4))
ENOUGH_BLOCKS = 1024  # to prefer a larger tile


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

        XLA keeps loaded kernels by the address of their text, where another may lie later on. Of
        that the name is not found, instead of a wrong kernel.
        """
        digest = hashlib.sha256(repr((self.source, self.macros)).encode()).hexdigest()
        return f"jax_roipool_{self.source.removesuffix('.cu')}_{self.element}_{digest[:12]}"


class MaximaPlan(NamedTuple):
    """The kernels of a `rectangle_max`."""

    pool: Kernel
    make_tiles: Kernel | None
    tiles: int  # of all images and levels


def rectangle_max(
    problem: Problem,
    dtype: np.dtype,
    argmax_dtype: np.dtype | None,
    *,
    empty_is_least: bool,
    levels: int | None = None,
) -> MaximaPlan | None:
    """The plan for maxima; with that many levels of tiles, or as many as can pay."""
    vector = _vector(problem.C, dtype)
    vectors = problem.C // vector
    levels = worthwhile_levels(problem) if levels is None else levels
    items = min(max(problem.Q * vectors, THREADS), MAX_ITEMS)
    common = {
        **_macros(problem, dtype, argmax_dtype or np.dtype(np.int32), vector, THREADS),
        "WITH_ARGMAX": int(argmax_dtype is not None),
        "LEVELS": levels,
    }
    pool = _kernel(
        "rectangle_max.cu",
        dtype,
        {**common, "ITEMS": items, "EMPTY_IS_LEAST": int(empty_is_least)},
        blocks=math.ceil(problem.bins * vectors / items),
    )
    if not levels:
        return MaximaPlan(pool, None, 0) if _fits(pool) else None
    images = problem.G * problem.n
    last = math.prod(((size - 1) >> levels) + 1 for size in (problem.H, problem.W))
    blocks = math.ceil(images * last * vectors / THREADS)
    make_tiles = _kernel("tiles.cu", dtype, common, blocks)
    tiles = images * sum((problem.H >> i) * (problem.W >> i) for i in range(1, levels + 1))
    return MaximaPlan(pool, make_tiles, tiles) if _fits(pool, make_tiles) else None


def worthwhile_levels(problem: Problem) -> int:
    """As many as can serve a bin of a RoI as large as the map, or 0 if bins are small anyway."""
    if problem.H * problem.W < CELLS_A_BIN * problem.P * problem.Q:
        return 0
    side = min(math.ceil(problem.H / problem.P), math.ceil(problem.W / problem.Q))
    return max(0, min(MAX_LEVELS, (side // 2).bit_length() - 1))


def scatter_at_argmax(
    problem: Problem,
    dtype: np.dtype,
    argmax_dtype: np.dtype,
    *,
    tile: tuple[int, int] | None = None,
) -> Kernel | None:
    """The plan for gradients; of tiles of that size, or as large as keeps a GPU busy."""
    is_integer = np.issubdtype(dtype, np.integer)
    if is_integer or problem.K * problem.P * problem.Q >= INDEX_LIMIT:
        return None
    vector = math.gcd(problem.C, 1 if dtype.itemsize > 4 else 2)  # whose sums are 8 bytes at most
    slices = math.ceil(problem.C / vector / WARP)

    def blocks(rows: int, columns: int) -> int:
        tiles = math.ceil(problem.H / rows) * math.ceil(problem.W / columns)
        return problem.G * problem.n * tiles * slices

    tile = tile or next((tile for tile in TILES if blocks(*tile) >= ENOUGH_BLOCKS), TILES[-1])
    macros = {
        **_macros(problem, dtype, argmax_dtype, vector, WARP),
        "TILE_ROWS": tile[0],
        "TILE_COLS": tile[1],
        "SUM": "double" if dtype.itemsize > 4 else "float",
    }
    kernel = _kernel("scatter_at_argmax.cu", dtype, macros, blocks(*tile))
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
