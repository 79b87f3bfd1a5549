"""The plots of the report: matplotlib figures as SVG, without a display."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from serve.measured import Row

COLOURS = ("#a9b2bd", "#d98a29", "#1f5fd6", "#0b7a4b")
MEASURES = {"held_R@1": "R@1, held back", "calibrate_right": "comparisons won, held back"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # letters stay letters: small, sharp and searchable
    "svg.hashsalt": "idem",
    "font.family": "sans-serif",
    "font.sans-serif": ["system-ui", "Segoe UI", "Roboto", "Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b9c0c9",
    "axes.labelcolor": "#5d6671",
    "xtick.color": "#5d6671",
    "ytick.color": "#5d6671",
    "legend.frameon": False,
}


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.2, 3.7), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color="#e3e6ea", linewidth=0.8)
    return figure, axes


def _svg(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def recall(rows: Sequence[Row]) -> bytes:
    """R@K against K for every row."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes()
        for row, colour, line in zip(rows, COLOURS, ("-", "-", "-", "--"), strict=False):
            axes.plot(range(1, len(row.recall) + 1), row.recall, line, color=colour, linewidth=2, label=row.name)
        axes.set(xlabel="K, products shown", ylabel="queries answered within K", ylim=(0, 1.02), xscale="log")
        ticks = [k for k in (1, 2, 5, 10, 20, 50, 100) if rows and k <= len(rows[0].recall)]
        axes.set_xticks(ticks, [str(k) for k in ticks])
        axes.minorticks_off()
        figure.legend(loc="outside upper center", ncols=2, fontsize=9.5)
        return _svg(figure)


def _points(curve: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """(seconds, value) wherever `name` was noted."""
    return [(point["seconds"], point[name]) for point in curve if isinstance(point.get(name), int | float)]


def training(curve: Sequence[Mapping[str, Any]]) -> bytes:
    """Loss against seconds, one colour a stage, and what was measured on held-back data on an axis of its own."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes()
        names = list(dict.fromkeys(point.get("stage", "") for point in curve))
        for name, colour in zip(names, (COLOURS[1], COLOURS[2], COLOURS[3], COLOURS[0]), strict=False):
            points = _points([point for point in curve if point.get("stage", "") == name], "loss")
            axes.plot(*_columns(points), color=colour, linewidth=1.4, label=f"loss, {name}" if name else "loss")
        if points := _points(curve, "calibrate_loss"):
            axes.plot(*_columns(points), color=COLOURS[2], marker="o", markersize=4, linewidth=1.4, label="loss, held back")
        axes.set(xlabel="seconds of training", ylabel="loss")
        handles, labels = axes.get_legend_handles_labels()
        measures = {said: points for name, said in MEASURES.items() if (points := _points(curve, name))}
        for said, points in measures.items():
            right = axes.twinx()
            right.spines["right"].set_visible(True)
            handles += right.plot(*_columns(points), color="#16191d", marker="o", markersize=4, linewidth=1.2)
            labels.append(said)
            right.set(ylim=(0, 1), ylabel=said)
        figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=9.5)
        return _svg(figure)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
