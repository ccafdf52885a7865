"""RoI max pooling written out as its definition, in plain NumPy and slow loops.

The tests compare the library with this file, so it shares nothing with the library: a convention
is read through its four fields only.
"""

import math

import numpy as np

COORDINATE_LIMIT = 2**29


def to_cell(coordinate, spatial_scale):
    """The cell of a coordinate: a float32 product, kept in range, rounded half away from zero."""
    with np.errstate(over="ignore", under="ignore"):
        product = float(np.float32(coordinate) * np.float32(spatial_scale))
    product = min(max(product, -COORDINATE_LIMIT), COORDINATE_LIMIT)
    # Exact: a float32 and a half always add up exactly in float64 in this range.
    return int(math.copysign(math.floor(abs(product) + 0.5), product))


def bin_edges(start, stop, bins, size, convention):
    """The half-open cell range of each bin along one axis, clipped to `[0, size]`."""
    length = max(stop - start + int(convention.inclusive_end), 1)

    if convention.float32_edges:
        step = np.float32(length) / np.float32(bins)

        def floor(i):
            return math.floor(np.float32(i) * step)

        def ceil(i):
            return math.ceil(np.float32(i) * step)

    else:

        def floor(i):
            return i * length // bins

        def ceil(i):
            return -(-i * length // bins)

    edges = []
    for i in range(bins):
        low = floor(i)
        high = ceil(i + 1) if convention.overlapping_bins else max(low + 1, floor(i + 1))
        edges.append(tuple(min(max(start + edge, 0), size) for edge in (low, high)))
    return edges


def image_of(features_shape, rois, k):
    """The leading index of the image that RoI `k` reads, or None if it reads none."""
    if len(features_shape) == 3:
        return ()
    if rois.shape[-1] == 4:
        return (k[0],)
    index = rois[k][0]
    if not np.isfinite(index) or index != int(index) or not 0 <= index < features_shape[0]:
        return None
    return (int(index),)


def empty_bin(dtype, convention):
    """What a bin without cells gives."""
    if convention.empty_value == 0:
        return 0
    return np.iinfo(dtype).min if np.issubdtype(dtype, np.integer) else -np.inf


def first_maximum(cells):
    """The position, per channel, of the first NaN of `[cells, C]`, or else of the first maximum."""
    if not np.issubdtype(cells.dtype, np.integer):
        cells = cells.astype(np.float64)  # Exact, and NumPy's own comparisons from here on.
    best = np.zeros(cells.shape[1], int)
    for channel, values in enumerate(cells.T):
        for position, value in enumerate(values):
            if np.isnan(value):
                best[channel] = position
                break
            if value > values[best[channel]]:
                best[channel] = position
    return best


def roi_pool(features, rois, output_size, convention, spatial_scale=1.0, roi_mask=None):
    """The pooled features and their argmax, for every layout that the library takes."""
    features, rois = np.asarray(features), np.asarray(rois)
    *_, height, width, channels = features.shape
    lead = rois.shape[:-1]
    pooled = np.zeros((*lead, *output_size, channels), features.dtype)
    argmax = np.full(pooled.shape, -1, np.int32)

    for k in np.ndindex(*lead):
        image = image_of(features.shape, rois, k)
        box = rois[k][-4:].astype(np.float32)
        excluded = roi_mask is not None and not np.asarray(roi_mask)[k]
        if image is None or excluded or not np.isfinite([*box, np.float32(spatial_scale)]).all():
            continue
        x1, y1, x2, y2 = (to_cell(coordinate, spatial_scale) for coordinate in box)
        rows = bin_edges(y1, y2, output_size[0], height, convention)
        columns = bin_edges(x1, x2, output_size[1], width, convention)
        for p, (top, bottom) in enumerate(rows):
            for q, (left, right) in enumerate(columns):
                cells = features[image][top:bottom, left:right].reshape(-1, channels)
                if not len(cells):
                    pooled[k][p, q] = empty_bin(features.dtype, convention)
                    continue
                best = first_maximum(cells)
                row, column = np.divmod(best, right - left)
                pooled[k][p, q] = cells[best, np.arange(channels)]
                argmax[k][p, q] = (top + row) * width + left + column
    return pooled, argmax


def roi_pool_grad(cotangent, argmax, features_shape, rois):
    """The gradient of the features, in float64: each bin's cotangent goes whole to its argmax."""
    *_, width, _ = features_shape
    rois = np.asarray(rois)
    grad = np.zeros(features_shape, np.float64)
    for index in np.ndindex(*argmax.shape):
        if argmax[index] >= 0:
            image = image_of(features_shape, rois, index[: rois.ndim - 1])
            row, column = divmod(int(argmax[index]), width)
            grad[(*image, row, column, index[-1])] += float(cotangent[index])
    return grad
