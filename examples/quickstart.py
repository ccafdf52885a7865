"""RoI pooling in one picture: a region of an 8x8 feature map, pooled to 2x2.

    python examples/quickstart.py

prints the four maxima and the gradient of their sum, and draws the map, the region's bins and the
cell that wins each of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jax_roipool import roi_pool, roi_pool_with_argmax

FEATURES = np.array(
    [
        [0.88, 0.44, 0.14, 0.16, 0.37, 0.77, 0.96, 0.27],
        [0.19, 0.45, 0.57, 0.16, 0.63, 0.29, 0.71, 0.70],
        [0.66, 0.26, 0.82, 0.64, 0.54, 0.73, 0.59, 0.26],
        [0.85, 0.34, 0.76, 0.84, 0.29, 0.75, 0.62, 0.25],
        [0.32, 0.74, 0.21, 0.39, 0.34, 0.03, 0.33, 0.48],
        [0.20, 0.14, 0.16, 0.13, 0.73, 0.65, 0.96, 0.32],
        [0.19, 0.69, 0.09, 0.86, 0.88, 0.07, 0.01, 0.48],
        [0.83, 0.24, 0.97, 0.04, 0.24, 0.35, 0.50, 0.91],
    ],
    dtype=np.float32,
)
ROI = (0, 3, 7, 8)  # x1, y1, x2, y2
OUTPUT_SIZE = (2, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("quickstart.png"), help="picture to write"
    )
    output = parser.parse_args().output

    features = jnp.asarray(FEATURES)[..., None]  # [H, W, C]
    rois = jnp.array([ROI])  # [K, 4]

    pooled, argmax = jax.jit(roi_pool_with_argmax, static_argnums=2)(features, rois, OUTPUT_SIZE)
    print("pooled:")
    for row in pooled[0, ..., 0]:
        print(" ".join(f"{value:.2f}" for value in row))

    gradient = jax.grad(lambda features: roi_pool(features, rois, OUTPUT_SIZE).sum())(features)
    print("gradient of their sum:")
    for row in gradient[..., 0]:
        print(" ".join(f"{value:.0f}" for value in row))

    output.parent.mkdir(parents=True, exist_ok=True)
    draw(np.asarray(pooled)[0, ..., 0], np.asarray(argmax)[0, ..., 0]).savefig(output, dpi=120)
    print(f"wrote {output}")


def draw(pooled: np.ndarray, argmax: np.ndarray) -> Figure:
    """The map with its bins and winners, and what they pool to (`pooled`, `argmax`: `[P, Q]`)."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(8, 3))
    _draw_values(left, FEATURES)
    _draw_values(right, pooled)
    left.set_title("features, the RoI's bins and their maxima")
    right.set_title("pooled")

    x1, y1, x2, y2 = ROI
    P, Q = OUTPUT_SIZE
    rows = y1 + np.arange(P + 1) * (y2 - y1) // P
    cols = x1 + np.arange(Q + 1) * (x2 - x1) // Q
    winners = np.unravel_index(argmax, FEATURES.shape)
    colors = matplotlib.colormaps["Set1"].colors
    for index, (p, q) in enumerate(np.ndindex(P, Q)):
        bin_size = (cols[q + 1] - cols[q], rows[p + 1] - rows[p])
        _outline(left, (cols[q], rows[p]), bin_size, colors[index], inset=0.04)
        _outline(left, (winners[1][p, q], winners[0][p, q]), (1, 1), colors[index], inset=0.14)
        _outline(right, (q, p), (1, 1), colors[index], inset=0.04)
    return figure


def _draw_values(axes, values: np.ndarray) -> None:
    axes.imshow(values, cmap="Greys", vmin=0, vmax=1.6)
    for (row, col), value in np.ndenumerate(values):
        axes.text(col, row, f"{value:.2f}", ha="center", va="center")
    axes.set_axis_off()


def _outline(axes, corner, size, color, inset: float) -> None:
    (x, y), (width, height) = corner, size
    axes.add_patch(
        Rectangle(
            (x - 0.5 + inset, y - 0.5 + inset),
            width - 2 * inset,
            height - 2 * inset,
            fill=False,
            edgecolor=color,
            linewidth=3,
        )
    )


if __name__ == "__main__":
    main()
