"""Draws `conventions.svg`: the bins of one RoI under each convention, as the library makes them.

    python docs/draw_conventions.py

The SVG is written here, without a plotting library, so that it is the same text everywhere.
`tests/test_docs.py` compares it.
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jax_roipool import CONVENTIONS, roi_pool

H, W = 8, 10
ROI = (1, 1, 8, 6)
OUTPUT_SIZE = (2, 3)

CELL = 30
MARGIN = 20
TOP = 58
PANEL = (W * CELL + 2 * MARGIN, TOP + H * CELL + MARGIN)
COLORS = ("#4063d8", "#d55e00", "#009e73", "#aa3377", "#b8860b", "#56708a")
INSET = 3


def bins(convention: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The first row and the one after the last of each row of bins, and columns likewise."""
    # Channel c is 1 at cell c alone: what a bin pools to says which cells it has.
    cells = jnp.eye(H * W).reshape(H, W, H * W)
    pooled = roi_pool(cells, jnp.array([ROI]), OUTPUT_SIZE, convention=convention)
    has = np.asarray(pooled[0]).reshape(*OUTPUT_SIZE, H, W)
    rows = [np.flatnonzero(has[p, 0].any(axis=1)) for p in range(OUTPUT_SIZE[0])]
    columns = [np.flatnonzero(has[0, q].any(axis=0)) for q in range(OUTPUT_SIZE[1])]
    return tuple(
        [(int(cells[0]), int(cells[-1]) + 1) for cells in axis] for axis in (rows, columns)
    )


def draw() -> str:
    """The SVG."""
    width, height = 2 * PANEL[0], 2 * PANEL[1]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for index, convention in enumerate(CONVENTIONS):
        x, y = index % 2 * PANEL[0], index // 2 * PANEL[1]
        lines += [f'<g transform="translate({x + MARGIN} {y})">', *_panel(convention), "</g>"]
    return "\n".join([*lines, "</svg>", ""])


def _panel(convention: str) -> list[str]:
    rows, columns = bins(convention)
    lines = [
        f'<text y="24" font-size="17" font-weight="bold">"{convention}"</text>',
        f'<text y="44" font-size="13">rows {_ranges(rows)}; columns {_ranges(columns)}</text>',
    ]
    for row in range(H):
        for column in range(W):
            lines.append(_rectangle(column, row, column + 1, row + 1, 'stroke="#ccc" fill="none"'))
    for p, (top, bottom) in enumerate(rows):
        for q, (left, right) in enumerate(columns):
            color = COLORS[p * len(columns) + q]
            style = f'stroke="{color}" stroke-width="2.5" fill="{color}" fill-opacity="0.22"'
            lines.append(_rectangle(left, top, right, bottom, style, INSET))
    style = 'stroke="black" stroke-width="1.5" stroke-dasharray="5 4" fill="none"'
    return [*lines, _rectangle(*ROI, style)]


def _ranges(axis: list[tuple[int, int]]) -> str:
    return " ".join(f"[{start}, {end})" for start, end in axis)


def _rectangle(x1: int, y1: int, x2: int, y2: int, style: str, inset: int = 0) -> str:
    x, y = x1 * CELL + inset, TOP + y1 * CELL + inset
    width, height = (x2 - x1) * CELL - 2 * inset, (y2 - y1) * CELL - 2 * inset
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" {style}/>'


if __name__ == "__main__":
    Path(__file__).with_name("conventions.svg").write_text(draw())
