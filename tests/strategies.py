"""Hypothesis draws of RoI pooling problems, over a short list of shapes: each shape compiles."""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st


class Layout(NamedTuple):
    features: tuple[int, ...]
    rois: tuple[int, ...]
    output_size: tuple[int, int]

    @property
    def pooled(self):
        return (*self.rois[:-1], *self.output_size, self.features[-1])


IMAGE = Layout((9, 11, 2), (6, 4), (3, 3))
BATCH = Layout((2, 7, 10, 2), (2, 4, 4), (2, 5))
FLAT = Layout((3, 6, 13, 2), (7, 5), (4, 3))
STRIP = Layout((1, 60, 1), (6, 4), (1, 7))

SCALES = (1.0, 0.5, 0.0625, 0.7, 1 / 3, 2.0)

# Coordinates that a careless conversion to an integer gets wrong.
EXTREME = (0.0, -0.0, 1e-45, 1e-30, -1e-30, 1e9, -1e9, 2.0**29, -(2.0**29), 2.0**31, -(2.0**31))
EXTREME += (2.0**40, -(2.0**40), 3e38, -3e38)
NOT_FINITE = (np.nan, np.inf, -np.inf)


@st.composite
def intervals(draw, size, scale):
    """The two coordinates of a RoI along an axis of `size` cells."""
    kind = draw(st.sampled_from(("box", "box", "box", "halves", "below", "floats", "extreme")))
    if kind == "box":
        start = draw(st.integers(-3, size + 1))
        pair = (start, start + draw(st.integers(-2, size + 4)))
    elif kind in ("halves", "below"):
        cells = [draw(st.integers(-2, size + 1)) + 0.5 for _ in range(2)]
        # "below": the float32 next to the half, where adding a half before a floor goes wrong.
        pair = cells if kind == "halves" else np.nextafter(np.float32(cells), np.float32(0))
    elif kind == "floats":
        pair = [draw(st.floats(-size, 2 * size, width=32)) for _ in range(2)]
    else:
        return [draw(st.one_of(st.sampled_from(EXTREME), st.integers(-3, size))) for _ in range(2)]
    return [np.float32(cell) / np.float32(scale) for cell in pair]


@st.composite
def rois(draw, layout, scale):
    """RoIs inside, outside, inverted, huge, not finite; with any image index in layout `FLAT`."""
    *_, height, width, _ = layout.features
    array = np.zeros(layout.rois, np.float32)
    for k in np.ndindex(*layout.rois[:-1]):
        x1, x2 = draw(intervals(width, scale))
        y1, y2 = draw(intervals(height, scale))
        box = [x1, y1, x2, y2]
        if draw(st.integers(0, 11)) == 0:
            box[draw(st.integers(0, 3))] = draw(st.sampled_from(NOT_FINITE))
        if layout.rois[-1] == 5:
            good = st.integers(0, layout.features[0] - 1)
            bad = st.sampled_from((-1.0, 0.5, 3.0, 1e10, -1e10, *NOT_FINITE))
            box = [draw(bad if draw(st.integers(0, 7)) == 0 else good), *box]
        array[k] = box
    return array


@st.composite
def masks(draw, layout):
    """No mask, or one that is mostly true."""
    shape = layout.rois[:-1]
    if draw(st.booleans()):
        return np.ones(shape, bool)
    kept = st.integers(0, 3).map(bool)
    return np.array([draw(kept) for _ in range(int(np.prod(shape)))]).reshape(shape)


@st.composite
def features(draw, layout, dtype=np.float32):
    """Maps with and without ties, all negative, with NaN, infinities and signed zeros."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    shape = layout.features
    kind = draw(st.sampled_from(("distinct", "ties", "negative", "zeros", "special", "infinite")))
    if kind == "distinct":
        return rng.permutation(int(np.prod(shape))).reshape(shape).astype(dtype)
    if kind == "zeros":
        return rng.choice(np.array([0.0, -0.0, -1.0], dtype), shape)
    if kind == "special":
        values = [0, -0.0, 1, 1, 2, -3, np.nan, np.inf, -np.inf]
        chances = [0.15, 0.15, 0.15, 0.1, 0.15, 0.15, 0.03, 0.04, 0.08]
        return rng.choice(np.array(values, dtype), shape, p=chances)
    if kind == "infinite":
        return rng.choice(np.array([-np.inf, -5], dtype), shape, p=[0.95, 0.05])
    low, high = (-9, 0) if kind == "negative" else (0, 4)
    return rng.integers(low, high, shape).astype(dtype)


class Problem(NamedTuple):
    features: np.ndarray
    rois: np.ndarray
    cotangent: np.ndarray
    spatial_scale: np.float32
    roi_mask: np.ndarray


@st.composite
def problems(draw, layout):
    """Everything that one call of layout `layout` and its gradient take."""
    scale = np.float32(draw(st.sampled_from(SCALES)))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    return Problem(
        features=draw(features(layout)),
        rois=draw(rois(layout, scale)),
        # Small whole numbers: sums of them are exact in float32, so gradients compare exactly.
        cotangent=rng.integers(1, 9, layout.pooled).astype(np.float32),
        spatial_scale=scale,
        roi_mask=draw(masks(layout)),
    )
