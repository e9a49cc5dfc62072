"""Plots: an experiment says which numbers, this module draws them, as SVG that git and DVC can compare."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import records

if TYPE_CHECKING:
    from lab.claims import Evidence

MARKER = 150
"""Area of a marker of `area` 1, in square points."""

MANY = 5
"""More labels than these stand beside the axes, where they cover no line."""

COLOURS, STYLES = 10, ("-", "--", ":")
"""So many lines have colours of their own; the next ones begin with the first colour again, in the next style."""

DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7))
"""Where a label may stand from its point, the best first: across and up."""


@dataclass(frozen=True)
class Line:
    """Points of one curve; `low` and `high` are the ends of error bars, where there are any.

    `area` is that of each point's marker, 1 for the usual: a third quantity.
    """

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    area: Sequence[float] | None = None


@dataclass(frozen=True)
class Plot:
    """One picture: labelled lines, made from the evidence."""

    name: str
    title: str
    x: str
    y: str
    lines: Callable[[Evidence], Mapping[str, Line]]
    log_x: bool = False
    log_y: bool = False
    joined: bool = True
    """Whether a line leads from point to point."""
    named: bool = False
    """Whether the labels stand beside the points instead of in a legend."""


def draw(plot: Plot, evidence: Evidence, path: Path) -> Path | None:
    """Draw a plot into the SVG file `path`; None where the evidence is not there, or not whole."""
    from lab.claims import UNFIT

    try:
        lines = plot.lines(evidence)
    except UNFIT:
        return None
    if not lines:
        return None
    import matplotlib

    matplotlib.use("Agg")
    # Ids by content and no date: the same numbers give the same bytes.
    matplotlib.rcParams.update({"svg.hashsalt": plot.name, "font.size": 10})
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for place, (label, line) in enumerate(lines.items()):
        style = STYLES[place // COLOURS % len(STYLES)] if plot.joined else "none"
        (drawn,) = axes.plot(line.x, line.y, marker="o", markersize=4, linestyle=style, label=label)
        if line.area is not None:
            areas = [MARKER * area for area in line.area]
            axes.scatter(line.x, line.y, s=areas, color=drawn.get_color(), alpha=0.4, linewidth=0)
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=drawn.get_color(), alpha=0.18, linewidth=0)
    axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y)
    if plot.log_x:
        axes.set_xscale("log")
    if plot.log_y:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if plot.named:
        _write_names(axes, lines)
    elif len(lines) > MANY:
        figure.legend(frameon=False, loc="outside right center")
    else:
        axes.legend(frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    records.write_text(path, buffer.getvalue())
    return path


def _write_names(axes: Any, lines: Mapping[str, Line]) -> None:
    """Each label beside the last point of its line: at the first place where it covers no point and no other label."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    axes.margins(0.15)
    axes.figure.draw_without_rendering()  # settles where the points lie
    taken = []
    for line in lines.values():
        for place, point in enumerate(axes.transData.transform(list(zip(line.x, line.y, strict=True)))):
            radius = _radius(line, place) * axes.figure.dpi / 72
            taken.append(Bbox([point - radius, point + radius]))
    for label, line in lines.items():
        text = axes.annotate(
            label,
            (line.x[-1], line.y[-1]),
            (0, 0),
            textcoords="offset points",
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "grey"},
        )
        text.set_in_layout(False)
        for further, (across, up) in product((3, 12, 24, 36), DIRECTIONS):
            distance = _radius(line, -1) + further
            text.set_position((across * distance, up * distance))
            text.set_horizontalalignment("center" if not across else "left" if across > 0 else "right")
            text.set_verticalalignment("center" if not up else "bottom" if up > 0 else "top")
            text.update_positions(axes.figure.canvas.get_renderer())
            box = Text.get_window_extent(text)  # without the arrow
            inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def _radius(line: Line, place: int) -> float:
    """Of the marker of a point, in points."""
    return math.sqrt(MARKER * line.area[place] / math.pi) if line.area is not None else 2.0
