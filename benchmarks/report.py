"""What a run looks like: a table in the terminal, and two pictures, from what its JSON holds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = ("#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#F0E442")
FLOOR_COLOR, FLOOR_STYLES = "#555555", ("-", "--")
GROUP_WIDTH = 0.8  # of the distance between groups of bars


def header(results: dict[str, Any]) -> str:
    """Who was timed and how, and who was not; the heads of the table's columns."""
    lines = [f"{name}: {text}" for name, text in results["machine"].items()]
    for name, candidate in results["candidates"].items():
        lines.append(f"{name} {candidate['version']}: {candidate['about']}")
    lines += [f"{name}: {reason}" for name, reason in results["missing"].items()]
    lines += [
        "",
        f"Median in ms and its ratio to that of {results['reference']};",
        "below, the 10th to the 90th percentile and the number of repeats.",
        f"{'':28}" + "".join(f"{name:>19}" for name in results["candidates"]),
    ]
    return "\n".join(lines)


def row(cell: dict[str, Any], names: list[str]) -> str:
    """Two lines of the table."""
    medians, spreads = f"{cell['label']:28}", f"  {cell['mode']:26}"
    for name in names:
        median = spread = ""
        if name in cell["times"]:
            time = cell["times"][name]
            median = _number(time["median_ms"])
            if time["ratio"] is not None:
                median += f" {_number(time['ratio']) + 'x':>7}"
            spread = f"{_number(time['p10_ms'])}-{_number(time['p90_ms'])} x{time['repeats']}"
        elif name in cell["errors"]:
            median = "ERROR"
        medians += f"{median:>19}"
        spreads += f"{spread:>19}"
    return f"{medians.rstrip()}\n{spreads.rstrip()}"


def _number(value: float) -> str:
    """Three significant digits or so, and never an exponent."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 3
    return f"{value:.{decimals}f}"


def rows(results: dict[str, Any]) -> Iterator[str]:
    """The table's rows of a whole run."""
    for cell in itertools.chain(results["workloads"], results["curves"]):
        yield row(cell, list(results["candidates"]))


def draw_workloads(results: dict[str, Any]) -> Figure:
    """Bars for each workload, one row for each mode; floors are lines across a group."""
    modes = list(dict.fromkeys(cell["mode"] for cell in results["workloads"]))
    figure, all_axes = _figure(results, len(modes), 1)
    for axes, mode in zip(all_axes[:, 0], modes, strict=True):
        cells = [cell for cell in results["workloads"] if cell["mode"] == mode]
        pooling = [name for name in _names(cells) if not results["candidates"][name]["floor"]]
        for group, cell in enumerate(cells):
            for name, time in cell["times"].items():
                style = _style(results, name)
                if results["candidates"][name]["floor"]:
                    ends = (group - GROUP_WIDTH / 2, group + GROUP_WIDTH / 2)
                    axes.plot(ends, [time["median_ms"]] * 2, linewidth=2, zorder=3, **style)
                else:
                    width = GROUP_WIDTH / len(pooling)
                    left = group - GROUP_WIDTH / 2 + width * pooling.index(name)
                    _draw_bar(axes, left, width, time, style)
        axes.set_xticks(range(len(cells)), [_describe(cell) for cell in cells], fontsize=11)
        axes.margins(y=0.12)
        axes.set_title(f"{mode} (numbers: times that of {results['reference']})")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    return _finished(figure, all_axes)


def _draw_bar(axes: Axes, left: float, width: float, time: dict, style: dict[str, Any]) -> None:
    axes.bar(
        left, time["median_ms"], width, align="edge", color=style["color"], label=style["label"]
    )
    centre = left + width / 2
    axes.plot([centre, centre], [time["p10_ms"], time["p90_ms"]], color="black", linewidth=1.2)
    if time["ratio"] is not None:
        axes.annotate(
            f"{_number(time['ratio']).removesuffix('.00')}x",
            (centre, max(time["p90_ms"], time["median_ms"])),
            (0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=10,
        )


def draw_curves(results: dict[str, Any]) -> Figure:
    """Time against one quantity in each column, one row for each mode."""
    modes = list(dict.fromkeys(cell["mode"] for cell in results["curves"]))
    quantities = list(dict.fromkeys(cell["quantity"] for cell in results["curves"]))
    figure, all_axes = _figure(results, len(modes), len(quantities))
    for (i, mode), (j, quantity) in itertools.product(enumerate(modes), enumerate(quantities)):
        axes = all_axes[i, j]
        cells = [c for c in results["curves"] if (c["mode"], c["quantity"]) == (mode, quantity)]
        for name in _names(cells):
            points = [(c["value"], c["times"][name]) for c in cells if name in c["times"]]
            marker = None if results["candidates"][name]["floor"] else "o"
            values, medians = zip(*[(x, time["median_ms"]) for x, time in points], strict=True)
            axes.plot(values, medians, marker=marker, markersize=4, **_style(results, name))
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(quantity)
        axes.set_title(mode)
        axes.grid(alpha=0.3)
    return _finished(figure, all_axes)


def _figure(results: dict[str, Any], nrows: int, ncols: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(10, 0.9 + 3.4 * nrows), dpi=120, layout="constrained")
    machine = results["machine"]
    figure.suptitle(
        f"{results['title']} to 7x7, float32: {machine['processor']}, {machine['cores']} cores"
    )
    return figure, figure.subplots(nrows, ncols, squeeze=False, sharey="row")


def _finished(figure: Figure, all_axes: Any) -> Figure:
    for axes in all_axes[:, 0]:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylabel("ms a call")
    handles, labels = all_axes[0, 0].get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    figure.legend(by_label.values(), by_label, loc="outside lower center", ncols=4)
    return figure


def _names(cells: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for cell in cells for name in cell["times"]))


def _style(results: dict[str, Any], name: str) -> dict[str, Any]:
    """The same colour for a candidate everywhere, and grey lines for floors."""
    floor = results["candidates"][name]["floor"]
    alike = [n for n, c in results["candidates"].items() if c["floor"] == floor]
    index = alike.index(name)
    if floor:
        return {"color": FLOOR_COLOR, "linestyle": FLOOR_STYLES[index], "label": name}
    return {"color": COLORS[index % len(COLORS)], "label": name}


def _describe(cell: dict[str, Any]) -> str:
    N, H, W, C = cell["workload"]["map_shape"]
    return f"{cell['label']}\n{N}x{H}x{W}x{C}, {cell['workload']['num_rois']} RoIs"
