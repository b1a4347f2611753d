"""The studies' figures: effects side by side, and named points, with 95 % intervals."""

import math
import textwrap
from collections.abc import Iterable
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import Bbox

from analysis.evidence import EffectEstimate
from analysis.figures import COLOURS, GREY, MARKERS, STYLE

PANEL = (4.6, 3.4)

_WIDTH = 7.6
"""Inches of a figure of intervals: about a page's text, so that its letters stay readable."""

_ROW, _BETWEEN_PANELS = 0.34, 0.75
"""Inches of an interval's row, and of a panel's title, labels and gap."""


class Point(NamedTuple):
    """A named point with a vertical interval."""

    name: str
    x: float
    y: float
    low: float = math.nan
    high: float = math.nan


def interval_figure(
    title: str, panels: dict[str, dict[str, EffectEstimate]], note: str, directed: bool = True
) -> Figure:
    """Draw effects with their intervals one below the other, one panel below the other.

    Panels of one unit share the scale of the horizontal axis.

    Args:
        title: title of the figure.
        panels: effects by name, by the panel's name.
        note: caption.
        directed: whether one side of zero is better; then circles help and squares harm.
    """
    rows = [len(panel) for panel in panels.values()]
    with rc_context(STYLE):
        height = _ROW * sum(rows) + _BETWEEN_PANELS * len(panels)
        figure = titled_figure(title, note, _WIDTH, height)
        grid = figure.add_gridspec(len(panels), height_ratios=[count + 0.4 for count in rows])
        first: dict[str, Axes] = {}
        for row, (name, estimates) in enumerate(panels.items()):
            unit = next(iter(estimates.values())).kind.unit
            panel = figure.add_subplot(grid[row], sharex=first.get(unit))
            first.setdefault(unit, panel)
            panel.set_title(name, loc="left")
            panel.axvline(0, color=GREY, linewidth=1, zorder=1)
            places = range(len(estimates) - 1, -1, -1)
            for place, estimate in zip(places, estimates.values(), strict=True):
                good = estimate.helps or not directed
                colour = COLOURS[0] if good else COLOURS[1]
                panel.plot([estimate.low, estimate.high], [place, place], color=colour, lw=1.6)
                panel.plot(
                    estimate.effect,
                    place,
                    marker="o" if good else "s",
                    markersize=6,
                    color=colour,
                    markerfacecolor=colour if estimate.shown else "white",
                )
            panel.set_yticks(list(places), [textwrap.fill(label, 50) for label in estimates])
            panel.set_ylim(-0.6, len(estimates) - 0.4)
            panel.set_xlabel(f"change ({unit})" if unit else "change")
            panel.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    return figure


def logarithmic_beyond_one(figure: Figure) -> None:
    """Draw the changes of a figure of intervals on a scale that is logarithmic beyond 1 %."""
    for panel in figure.axes:
        panel.set_xscale("symlog", linthresh=1)
        panel.set_xlabel("change (%), logarithmic beyond ±1 %")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.autoscale(axis="x")


def point_figure(
    title: str,
    panels: dict[str, list[Point]],
    x_label: str,
    y_label: str,
    note: str,
) -> Figure:
    """Draw named points over a logarithmic axis, one panel per name.

    A name stands above its point's interval, or below it where it would overlap the name of a
    higher point.
    """
    with rc_context(STYLE):
        figure = titled_figure(title, note, PANEL[0] * len(panels) + 0.6, PANEL[1])
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        places = [point.x for points in panels.values() for point in points]
        for panel, (name, points) in zip(axes, panels.items(), strict=True):
            panel.set_title(name, loc="left")
            for point in sorted(points, key=lambda point: -point.y):
                if math.isfinite(point.low):
                    panel.plot(
                        [point.x, point.x], [point.low, point.high], color=COLOURS[0], lw=1.2
                    )
                panel.plot(point.x, point.y, MARKERS[0], color=COLOURS[0], markersize=5)
                panel.annotate(
                    point.name,
                    (point.x, point.high if math.isfinite(point.high) else point.y),
                    xytext=(0, 5),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7,
                    color=COLOURS[0],
                )
            panel.set_xscale("log")
            panel.set_xlim(min(places) / 1.8, 1.8 * max(places))
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_locator(NullLocator())
            panel.set_xlabel(x_label)
            panel.grid(color="#e6e6e6", linewidth=0.7)
            panel.margins(y=0.15)
        axes[0].set_ylabel(y_label)
        figure.draw_without_rendering()
        for panel, points in zip(axes, panels.values(), strict=True):
            _move_apart(panel.texts, sorted(points, key=lambda point: -point.y))
    return figure


def _move_apart(names: Iterable[Any], points: Iterable[Point]) -> None:
    """Move a name below its point's interval where it overlaps an earlier one."""
    taken: list[Bbox] = []
    for label, point in zip(names, points, strict=True):
        if label.get_window_extent().count_overlaps(taken):
            label.xy = (point.x, point.low if math.isfinite(point.low) else point.y)
            label.set_position((0, -11))
        taken.append(label.get_window_extent())


def titled_figure(title: str, note: str, width: float, height: float) -> Figure:
    """Return an empty figure with a title above and a note below.

    Call it within the style in which the figure is drawn.

    Args:
        title: title of the figure.
        note: caption.
        width: width of the figure in inches.
        height: height of the panels in inches.
    """
    figure = Figure(figsize=(width, height + 0.7))
    figure.suptitle(
        textwrap.fill(title, int(width * 10)), x=0.012, ha="left", fontsize=11, fontweight="bold"
    )
    lines = textwrap.fill(note, int(width * 15))
    bottom = (0.14 + 0.15 * (lines.count("\n") + 1)) / (height + 0.7)
    figure.text(0.012, 0.02, lines, fontsize=8, color=GREY, va="bottom")
    figure.set_layout_engine("constrained", rect=(0, bottom, 1, 1 - bottom))
    return figure
