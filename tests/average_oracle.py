"""The averages as their formulas read, in plain NumPy and slow loops.

The tests compare the library with this file, so it shares nothing with the library. Every average
here is a sum that splits into rows and columns: a bin's row has a weight for each row of the map,
its column one for each column. Coordinates and the position of a sample are float32, in the order
in which torchvision computes them; all that comes after is float64.

    weights = roi_align_weights(features.shape, rois, (7, 7), spatial_scale=1 / 16)
    pool(features, weights)                                 float64 [*lead, P, Q, C]
    pool_grad(cotangent, features.shape, weights)           float64, the shape of the features
    pool(abs(features), weights)                            what an error is measured against
    roi_average_pool_weights, pr_roi_pool_weights, ps_roi_align_weights, ps_roi_pool_weights,
    crop_and_resize_weights                                 likewise
    position_sensitive(weights)                             for ps_*: C = C' P Q, one for each bin

`lead` is `rois.shape[:-1]`, and the layouts are the library's. The gradient of boxes is
`box_grad(cotangent, features, weights)`, where they have one: pr_roi_pool and crop_and_resize.

`roi_align_in_order` and `roi_align_grad_in_order` are float32 and torchvision's to the last bit:
its order of operations as well.

    assign_levels(rois, spatial_scales, canonical_size=224, canonical_level=4)
    pool_levels(of_each_level, levels)                      picks each RoI's own
"""

import dataclasses
import math

import numpy as np

import oracle

COORDINATE_LIMIT = 2**29
F32 = np.float32


@dataclasses.dataclass
class Weights:
    """What each of R bins' rows and columns takes of a map, and of which map."""

    lead: tuple  # of the RoIs' shape; R is its product
    image: np.ndarray  # int [R], into the images as one list; -1 for a RoI that pools nothing
    rows: np.ndarray  # float64 [R, P, H]
    columns: np.ndarray  # float64 [R, Q, W]
    # For each of a box's four numbers: ("rows" or "columns", what these change by), or None.
    slopes: list | None = None
    position_sensitive: bool = False


def position_sensitive(weights):
    """Channel (c P + p) Q + q of the map feeds channel c of bin (p, q) alone."""
    return dataclasses.replace(weights, position_sensitive=True)


# Sums of weights and cells ------------------------------------------------------------------------


def _bins(features_shape, weights):
    """For each bin: its place in the result, the cells and the weights that are not 0."""
    C = features_shape[-1]
    P, Q = weights.rows.shape[1], weights.columns.shape[1]
    for r, image in enumerate(weights.image):
        if image < 0:
            continue
        rows = [np.flatnonzero(weights.rows[r, p]) for p in range(P)]
        columns = [np.flatnonzero(weights.columns[r, q]) for q in range(Q)]
        for p, q in np.ndindex(P, Q):
            channels = np.arange(p * Q + q, C, P * Q) if weights.position_sensitive else slice(None)
            cells = (image, rows[p][:, None], columns[q][None])
            product = np.outer(weights.rows[r, p, rows[p]], weights.columns[r, q, columns[q]])
            yield (r, p, q), cells, channels, product


def _images(features):
    features = np.asarray(features).astype(np.float64)  # exact, for bfloat16 as well
    return features.reshape(-1, *features.shape[-3:])


def pool(features, weights):
    """The weighted sums; a cell without weight is not read, whatever it holds."""
    images = _images(features)
    R, P, Q = (*weights.rows.shape[:2], weights.columns.shape[1])
    C = images.shape[-1] // (P * Q) if weights.position_sensitive else images.shape[-1]
    pooled = np.zeros((R, P, Q, C))
    for bin_, cells, channels, product in _bins(images.shape, weights):
        window = images[cells][..., channels]
        with np.errstate(invalid="ignore"):
            pooled[bin_] = np.einsum("hw,hwc->c", product, window)
    return pooled.reshape(*weights.lead, P, Q, C)


def pool_grad(cotangent, features_shape, weights):
    """The gradient of the features: each cell gets a bin's cotangent times its weight there."""
    grad = np.zeros((math.prod(features_shape[:-3]), *features_shape[-3:]))
    cotangent = np.asarray(cotangent).astype(np.float64)
    cotangent = cotangent.reshape(-1, *cotangent.shape[-3:])
    for bin_, (image, rows, columns), channels, product in _bins(grad.shape, weights):
        window = np.zeros((*product.shape, grad.shape[-1]))
        window[..., channels] = product[..., None] * cotangent[bin_]
        grad[image, rows, columns] += window
    return grad.reshape(features_shape)


def box_grad(cotangent, features, weights):
    """The gradient of the four numbers of each box, float64 [*lead, 4]."""
    grad = []
    cotangent = np.asarray(cotangent).astype(np.float64)
    for axis, slope in weights.slopes:
        change = pool(features, dataclasses.replace(weights, **{axis: slope}))
        grad.append((cotangent * change).sum(axis=(-3, -2, -1)))
    return np.stack(grad, axis=-1)


# RoIs ---------------------------------------------------------------------------------------------


def _boxes(features_shape, rois, spatial_scale, roi_mask, image_index):
    """The lead, the image of each RoI (-1: none), and its corners in cells, float32 [R, 4]."""
    rois = np.asarray(rois)
    lead = rois.shape[:-1]
    images = math.prod(features_shape[:-3])
    if rois.ndim == 3:
        index = np.repeat(np.arange(lead[0]), lead[1]).astype(float)
    elif len(features_shape) == 3:
        index = np.zeros(lead)
    else:
        index = np.asarray(rois[:, 0] if image_index is None else image_index).astype(float)
    corners = rois[..., -4:].reshape(-1, 4).astype(F32)
    with np.errstate(all="ignore"):
        real = (index >= 0) & (index < images) & (index == np.floor(index))
        real &= np.isfinite(corners).all(axis=1) & np.isfinite(F32(spatial_scale))
        if roi_mask is not None:
            real &= np.asarray(roi_mask).reshape(-1)
        cells = np.clip(corners * F32(spatial_scale), -F32(COORDINATE_LIMIT), COORDINATE_LIMIT)
        return lead, np.where(real, index, -1).astype(int), np.where(real[:, None], cells, 0)


def _by_axis(of_axis, features_shape, rois, output_size, spatial_scale, roi_mask, image_index):
    """Weights of which a RoI's rows come of (y1, y2) and its columns of (x1, x2)."""
    lead, image, cells = _boxes(features_shape, rois, spatial_scale, roi_mask, image_index)
    (P, Q), (H, W) = output_size, features_shape[-3:-1]
    rows, columns = np.zeros((len(cells), P, H)), np.zeros((len(cells), Q, W))
    for r, (x1, y1, x2, y2) in enumerate(cells):
        if image[r] >= 0:
            rows[r], columns[r] = of_axis(y1, y2, P, H), of_axis(x1, x2, Q, W)
    return Weights(lead, image, rows, columns)


# RoIAlign -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Samples:
    """The samples of one axis of a RoI, each between two cells; those outside weigh nothing."""

    low: np.ndarray  # int [P, n]
    high: np.ndarray  # int [P, n]
    weight_of_low: np.ndarray  # float32 [P, n]
    weight_of_high: np.ndarray  # float32 [P, n]
    inside: np.ndarray  # bool [P, n]
    count: int  # that a bin's sum is divided by


def sample_positions(start, stop, bins, size, sampling_ratio, aligned):
    """Where the samples of each bin are, float32 [P, n], and how many samples a bin has.

    With an adaptive ratio samples that are certainly outside are left out, and the rest padded
    with -2, which is outside.
    """
    with np.errstate(all="ignore"):
        start, stop = (F32(cell) - F32(0.5 if aligned else 0) for cell in (start, stop))
        length = stop - start if aligned else max(stop - start, F32(1))
        step = length / F32(bins)
        count = max(math.ceil(step), 0) if sampling_ratio is None else sampling_ratio
        positions = []
        for p in range(bins):
            first = start + F32(p) * step
            low, high = 0, count
            if sampling_ratio is None and count:
                # In float64, and past what the rounding of float32 can move a sample.
                slack = 3 + 2.0**-20 * max(abs(float(start)), abs(float(stop)))
                ends = [(x - float(first)) * count / float(step) for x in (-slack, size + slack)]
                low, high = (int(min(max(end, 0), count)) for end in (ends[0], ends[1] + 1))
            k = np.arange(low, high).astype(F32) + F32(0.5)
            positions.append(first + k * step / F32(max(count, 1)))
    longest = max(map(len, positions))
    padded = [np.pad(x, (0, longest - len(x)), constant_values=-2) for x in positions]
    return np.array(padded, F32), count


def samples(start, stop, bins, size, sampling_ratio, aligned):
    """The two cells that each sample is between, and its share of each."""
    x, count = sample_positions(start, stop, bins, size, sampling_ratio, aligned)
    inside = (x >= -1) & (x <= size)
    x = np.maximum(np.where(inside, x, 0), F32(0))
    low = np.minimum(np.floor(x).astype(int), size - 1)
    at_end = low == size - 1
    high = np.where(at_end, low, low + 1)
    share = np.where(at_end, F32(0), x - low.astype(F32))
    of_low, of_high = (np.where(inside, s, F32(0)) for s in (F32(1) - share, share))
    return Samples(low, high, of_low, of_high, inside, count)


def _align_axis(sampling_ratio, aligned):
    def of_axis(start, stop, bins, size):
        weights = np.zeros((bins, size))
        found = samples(start, stop, bins, size, sampling_ratio, aligned)
        for p in range(bins):
            np.add.at(weights[p], found.low[p], found.weight_of_low[p].astype(float))
            np.add.at(weights[p], found.high[p], found.weight_of_high[p].astype(float))
        return weights / max(found.count, 1)

    return of_axis


def _pair(sampling_ratio):
    return sampling_ratio if isinstance(sampling_ratio, tuple) else (sampling_ratio,) * 2


def roi_align_weights(
    features_shape,
    rois,
    output_size,
    spatial_scale=1.0,
    sampling_ratio=None,
    aligned=True,
    roi_mask=None,
    image_index=None,
):
    """`sampling_ratio`: an int, a pair for rows and columns, or None for adaptive."""
    common = (features_shape, rois, output_size, spatial_scale, roi_mask, image_index)
    of_rows, of_columns = _pair(sampling_ratio)
    weights = _by_axis(_align_axis(of_rows, aligned), *common)
    if of_columns != of_rows:
        weights.columns = _by_axis(_align_axis(of_columns, aligned), *common).columns
    return weights


def ps_roi_align_weights(*arguments, **options):
    """RoIAlign, aligned, of each bin's own channels; a RoI without area averages to 0."""
    return position_sensitive(roi_align_weights(*arguments, aligned=True, **options))


def _in_order(features_shape, rois, output_size, spatial_scale, sampling_ratio, aligned, mask):
    """For each RoI: its place, its image, and its samples along the rows and the columns."""
    _, image, cells = _boxes(features_shape, rois, spatial_scale, mask, None)
    (P, Q), (H, W) = output_size, features_shape[-3:-1]
    of_rows, of_columns = _pair(sampling_ratio)
    for r in np.flatnonzero(image >= 0):
        x1, y1, x2, y2 = cells[r]
        rows = samples(y1, y2, P, H, of_rows, aligned)
        columns = samples(x1, x2, Q, W, of_columns, aligned)
        if rows.count * columns.count:
            yield r, image[r], rows, columns


def _corners(rows, columns):
    """The four cells around a sample in torchvision's order, and the part of a weight of each."""
    for row, of_row in ((rows.low, rows.weight_of_low), (rows.high, rows.weight_of_high)):
        for column, of_column in (
            (columns.low, columns.weight_of_low),
            (columns.high, columns.weight_of_high),
        ):
            yield row, of_row, column, of_column


def roi_align_in_order(
    features, rois, output_size, spatial_scale=1.0, sampling_ratio=None, aligned=True, roi_mask=None
):
    """float32, torchvision's bits: samples row by row, the four cells of each first."""
    features, lead = np.asarray(features, F32), np.asarray(rois).shape[:-1]
    images = features.reshape(-1, *features.shape[-3:])
    pooled = np.zeros((math.prod(lead), *output_size, features.shape[-1]), F32)
    how = (output_size, spatial_scale, sampling_ratio, aligned, roi_mask)
    for r, image, rows, columns in _in_order(features.shape, rois, *how):
        total = np.zeros(pooled.shape[1:], F32)
        for i, j in np.ndindex(rows.low.shape[1], columns.low.shape[1]):
            sample = F32(0)
            for row, of_row, column, of_column in _corners(rows, columns):
                cells = images[image][row[:, None, i], column[None, :, j]]
                weight = of_row[:, None, i] * of_column[None, :, j]
                sample = sample + weight[..., None] * cells
            total += sample
        pooled[r] = total / F32(rows.count * columns.count)
    return pooled.reshape(*lead, *pooled.shape[1:])


def roi_align_grad_in_order(
    cotangent,
    features_shape,
    rois,
    spatial_scale=1.0,
    sampling_ratio=None,
    aligned=True,
    roi_mask=None,
):
    """float32, torchvision's bits: RoI by RoI, bin by bin, sample by sample, cell by cell."""
    cotangent = np.asarray(cotangent, F32)
    cotangent = cotangent.reshape(-1, *cotangent.shape[-3:])
    output_size = cotangent.shape[1:3]
    grad = np.zeros((math.prod(features_shape[:-3]), *features_shape[-3:]), F32)
    how = (output_size, spatial_scale, sampling_ratio, aligned, roi_mask)
    for r, image, rows, columns in _in_order(features_shape, rois, *how):
        count = F32(rows.count * columns.count)
        cells, updates = [], []
        for row, of_row, column, of_column in _corners(rows, columns):
            # [P, Q, rows of samples, columns of samples]
            weight = of_row[:, None, :, None] * of_column[None, :, None, :]
            place = np.broadcast_arrays(row[:, None, :, None], column[None, :, None, :])
            cells.append(np.stack(place, axis=-1))
            updates.append(cotangent[r][:, :, None, None] * weight[..., None] / count)
        inside = rows.inside[:, None, :, None] & columns.inside[None, :, None, :]
        at, update = (np.stack(x, axis=4)[inside] for x in (cells, updates))
        np.add.at(
            grad[image],
            (at[..., 0].ravel(), at[..., 1].ravel()),
            update.reshape(-1, update.shape[-1]),
        )
    return grad.reshape(features_shape)


# Means of whole cells -----------------------------------------------------------------------------


def _mean_axis(convention, unread=0):
    def of_axis(start, stop, bins, size):
        first, last = (oracle.to_cell(cell, 1) for cell in (start, stop))
        weights = np.zeros((bins, size))
        edges = oracle.bin_edges(first, last, bins, size - unread, convention)
        for p, (low, high) in enumerate(edges):
            if high > low:
                weights[p, low:high] = 1 / (high - low)
        return weights

    return of_axis


def roi_average_pool_weights(
    features_shape,
    rois,
    output_size,
    convention,
    spatial_scale=1.0,
    roi_mask=None,
    image_index=None,
):
    """The mean of a bin's cells inside the map, 0 if there are none; `convention` as in oracle."""
    common = (features_shape, rois, output_size, spatial_scale, roi_mask, image_index)
    return _by_axis(_mean_axis(convention), *common)


@dataclasses.dataclass
class _PositionSensitive:
    """The bins of `ps_roi_pool`, read by `oracle.bin_edges`."""

    inclusive_end: bool = False
    overlapping_bins: bool = True
    float32_edges: bool = True


def ps_roi_pool_weights(
    features_shape,
    rois,
    output_size,
    spatial_scale=1.0,
    roi_mask=None,
    image_index=None,
    unread=1,
):
    """torchvision's: its forward pass never reads the last row and column, `unread` of each.

    Its backward pass does, as if `unread` were 0.
    """
    common = (features_shape, rois, output_size, spatial_scale, roi_mask, image_index)
    return position_sensitive(_by_axis(_mean_axis(_PositionSensitive(), unread), *common))


# Precise RoI pooling ------------------------------------------------------------------------------


def _hat(x):
    return np.maximum(1 - np.abs(x), 0)


def _hat_integral(x):
    """The integral of the hat from -1 to x."""
    x = np.clip(x, -1, 1)
    return np.where(x <= 0, (1 + x) ** 2 / 2, 1 - (1 - x) ** 2 / 2)


def pr_axis(start, stop, bins, size):
    """The weights [P, H] of one axis, and what they change by with `start` and with `stop`."""
    start, stop = float(start), float(stop)
    if stop <= start:
        return np.zeros((3, bins, size))
    step = (stop - start) / bins
    p, cell = np.arange(bins)[:, None], np.arange(size)
    low, high = start + p * step - cell, start + (p + 1) * step - cell
    weights = (_hat_integral(high) - _hat_integral(low)) / step
    slopes = []
    for of_step, of_low, of_high in (
        (-1 / bins, 1 - p / bins, 1 - (p + 1) / bins),
        (1 / bins, p / bins, (p + 1) / bins),
    ):
        slopes.append((_hat(high) * of_high - _hat(low) * of_low - weights * of_step) / step)
    return np.stack([weights, *slopes])


def pr_roi_pool_weights(
    features_shape, rois, output_size, spatial_scale=1.0, roi_mask=None, image_index=None
):
    """The mean over a bin of the bilinear surface through the cells, which is 0 off the map.

    The slopes are those of the RoI's coordinates before the scale.
    """
    common = (features_shape, rois, output_size, spatial_scale, roi_mask, image_index)
    of = [_by_axis(lambda *axis, i=i: pr_axis(*axis)[i], *common) for i in range(3)]
    scale = float(F32(spatial_scale))
    of[0].slopes = [
        ("columns", scale * of[1].columns),
        ("rows", scale * of[1].rows),
        ("columns", scale * of[2].columns),
        ("rows", scale * of[2].rows),
    ]
    return of[0]


# TensorFlow's crops -------------------------------------------------------------------------------


def crop_axis(start, stop, bins, size):
    """As `pr_axis`, for normalised float32 ends; and which of the P samples are on the map."""
    start, stop, last = F32(start), F32(stop), F32(size - 1)
    result, inside = np.zeros((3, bins, size)), np.zeros(bins, bool)
    for p in range(bins):
        with np.errstate(all="ignore"):
            if bins > 1:
                x = start * last + F32(p) * ((stop - start) * last / F32(bins - 1))
                by_stop = float(last) * p / (bins - 1)
                by_start = float(last) - by_stop
            else:
                x = F32(0.5 * float(start + stop) * (size - 1))
                by_start = by_stop = 0.5 * (size - 1)
        inside[p] = 0 <= x <= last
        if not inside[p]:
            continue
        low, high = math.floor(x), math.ceil(x)
        share = float(x - F32(low))
        for cell, weight, slope in ((low, 1 - share, -1), (high, share, 1)):
            result[:, p, cell] += weight, slope * by_start, slope * by_stop
    return result, inside


def crop_and_resize_weights(images_shape, boxes, box_indices, crop_size):
    """The weights, and which of the bins [R, P, Q] are on the map; elsewhere is the constant.

    The slopes are in the order of a box, (y1, x1, y2, x2).
    """
    boxes = np.asarray(boxes, F32)
    real = (np.asarray(box_indices) >= 0) & (np.asarray(box_indices) < images_shape[0])
    real &= np.isfinite(boxes).all(axis=1)
    (P, Q), (H, W), R = crop_size, images_shape[1:3], len(boxes)
    rows, columns = np.zeros((3, R, P, H)), np.zeros((3, R, Q, W))
    inside = np.zeros((R, P, Q), bool)
    for r in np.flatnonzero(real):
        y1, x1, y2, x2 = boxes[r]
        rows[:, r], rows_inside = crop_axis(y1, y2, P, H)
        columns[:, r], columns_inside = crop_axis(x1, x2, Q, W)
        inside[r] = rows_inside[:, None] & columns_inside
    slopes = [
        ("rows", rows[1]),
        ("columns", columns[1]),
        ("rows", rows[2]),
        ("columns", columns[2]),
    ]
    image = np.where(real, box_indices, -1)
    return Weights((R,), image, rows[0], columns[0], slopes), inside


def crop_and_resize(images, boxes, box_indices, crop_size, extrapolation_value=0.0):
    """The crops, float64. A box without an image or not finite is all constant."""
    weights, inside = crop_and_resize_weights(np.shape(images), boxes, box_indices, crop_size)
    return np.where(inside[..., None], pool(images, weights), extrapolation_value)


# Levels -------------------------------------------------------------------------------------------


def assign_levels(rois, spatial_scales, canonical_size=224, canonical_level=4):
    """torchvision's formula in float32: an index into the levels, or -1 for a RoI without one."""
    x1, y1, x2, y2 = np.moveaxis(np.asarray(rois)[..., -4:].astype(F32), -1, 0)
    with np.errstate(all="ignore"):
        size = np.sqrt((x2 - x1) * (y2 - y1)) / F32(canonical_size)
        logarithm = np.log2(size.astype(np.float64)).astype(F32)
        level = np.floor(F32(canonical_level) + logarithm + F32(1e-6))
        first, last = (-math.log2(spatial_scales[i]) for i in (0, -1))
        index = np.clip(level, first, last) - first
        found = ~np.isnan(index) & np.isfinite(np.stack([x1, y1, x2, y2])).all(axis=0)
        return np.where(found, index, -1).astype(np.int32)


def pool_levels(of_each_level, levels):
    """Each RoI's result from its own level, of `[*lead, P, Q, C]` for all levels; -1 gives 0."""
    pooled = np.zeros_like(of_each_level[0])
    for i, of_level in enumerate(of_each_level):
        pooled[levels == i] = of_level[levels == i]
    return pooled
