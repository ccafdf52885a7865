"""The contract of the rectangle max's backends, in plain NumPy and slow loops.

The tests hold the backends to this file, so it shares nothing with the library. Features are
`[G, n, H, W, C]` and edges `[G, K, 1 + 2P + 2Q]`: an image index, P first rows, P rows after the
last ones, Q first columns and Q columns after the last ones.
"""

import functools
import hashlib

import numpy as np


def remembered(function):
    """The function, which is slow, and asked the same of every backend."""
    answers = {}

    @functools.wraps(function)
    def answer(*arguments):
        key = tuple(
            (x.shape, x.dtype, hashlib.sha256(np.ascontiguousarray(x)).digest())
            if isinstance(x, np.ndarray)
            else x
            for x in arguments
        )
        if key not in answers:
            answers[key] = function(*arguments)
        return answers[key]

    return answer


def is_integer(dtype):
    return np.issubdtype(dtype, np.integer)


def split(roi, output_size):
    """The image index of one RoI, its P row ranges and its Q column ranges."""
    bins_down, bins_across = output_size
    roi = [int(number) for number in roi]
    assert len(roi) == 1 + 2 * bins_down + 2 * bins_across
    rows, columns = roi[1 : 1 + 2 * bins_down], roi[1 + 2 * bins_down :]
    return (
        roi[0],
        list(zip(rows[:bins_down], rows[bins_down:], strict=True)),
        list(zip(columns[:bins_across], columns[bins_across:], strict=True)),
    )


def of_empty(dtype, empty_value):
    """What a rectangle without cells gives."""
    if empty_value == 0:
        return 0
    assert empty_value == -np.inf
    return np.iinfo(dtype).min if is_integer(dtype) else -np.inf


def first_maxima(cells):
    """The position, in each column of `[cells, C]`, of the first NaN or else the first maximum."""
    if is_integer(cells.dtype):
        return (cells == cells.max(axis=0)).argmax(axis=0)
    with np.errstate(invalid="ignore"):  # A NaN that signals is a NaN.
        cells = cells.astype(np.float64)  # Exact, and compared by NumPy itself from here on.
    is_nan = np.isnan(cells)
    is_largest = cells == np.where(is_nan, -np.inf, cells).max(axis=0)
    return np.where(is_nan.any(axis=0), is_nan.argmax(axis=0), is_largest.argmax(axis=0))


@remembered
def rectangle_max(features, edges, output_size, empty_value):
    """The maxima, and their cells in int32."""
    groups, images, _, width, channels = features.shape
    maxima = np.zeros((groups, edges.shape[1], *output_size, channels), features.dtype)
    argmax = np.full(maxima.shape, -1, np.int32)
    for g, k in np.ndindex(*edges.shape[:2]):
        image, rows, columns = split(edges[g, k], output_size)
        if not 0 <= image < images:
            continue
        for p, (top, bottom) in enumerate(rows):
            for q, (left, right) in enumerate(columns):
                if top >= bottom or left >= right:
                    maxima[g, k, p, q] = of_empty(features.dtype, empty_value)
                    continue
                cells = features[g, image, top:bottom, left:right].reshape(-1, channels)
                best = first_maxima(cells)
                row, column = np.divmod(best, right - left)
                maxima[g, k, p, q] = cells[best, np.arange(channels)]
                argmax[g, k, p, q] = (top + row) * width + left + column
    return maxima, argmax


def places(argmax, edges, map_shape):
    """Where the argmax says something: its own indices, and those of its cells in the features."""
    images, _, width = map_shape
    own = np.nonzero(argmax >= 0)
    image = edges[own[0], own[1], 0]
    own = tuple(index[(image >= 0) & (image < images)] for index in own)
    row, column = np.divmod(argmax[own].astype(np.int64), width)
    return own, (own[0], edges[own[0], own[1], 0], row, column, own[-1])


@remembered
def gather_at_argmax(features, argmax, edges):
    gathered = np.zeros(argmax.shape, features.dtype)
    own, cells = places(argmax, edges, features.shape[1:4])
    gathered[own] = features[cells]
    return gathered


@remembered
def scatter_at_argmax(cotangent, argmax, edges, map_shape):
    """The sums, in float64 and rounded once: those of whole numbers are exact in any order."""
    sums = np.zeros((cotangent.shape[0], *map_shape, cotangent.shape[-1]), np.float64)
    own, cells = places(argmax, edges, map_shape)
    with np.errstate(invalid="ignore", over="ignore"):
        np.add.at(sums, cells, cotangent[own].astype(np.float64))
        return sums.astype(cotangent.dtype)
