"""Plots: an experiment says which numbers, this module draws them, as SVG that git and DVC can compare."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lab import records

if TYPE_CHECKING:
    from lab.claims import Evidence


@dataclass(frozen=True)
class Line:
    """Points of one curve; `low` and `high` are the ends of error bars, where there are any."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


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


def draw(plot: Plot, evidence: Evidence, path: Path) -> Path | None:
    """Draw a plot into the SVG file `path`; None where the evidence is not there, or not whole."""
    from lab.claims import UNFIT

    try:
        lines = plot.lines(evidence)
    except UNFIT:
        return None
    import matplotlib

    matplotlib.use("Agg")
    # Ids by content and no date: the same numbers give the same bytes.
    matplotlib.rcParams.update({"svg.hashsalt": plot.name, "font.size": 10})
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for label, line in lines.items():
        style = "-" if plot.joined else "none"
        (drawn,) = axes.plot(line.x, line.y, marker="o", markersize=4, linestyle=style, label=label)
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=drawn.get_color(), alpha=0.18, linewidth=0)
    axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y)
    if plot.log_x:
        axes.set_xscale("log")
    if plot.log_y:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    records.write_text(path, buffer.getvalue())
    return path
