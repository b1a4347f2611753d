"""The studies' figures: effects along an axis, effects side by side, and named points.

Every effect has its 95 % interval. Lines differ in colour, marker and dash and are named at their
end, so that a figure is readable in grey and without a legend.
"""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import Bbox

from analysis.evidence import EffectEstimate
from analysis.figures import COLOURS, GREY, MARKERS, STYLE

DASHES: Any = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
PANEL = (4.6, 3.4)
LABEL_GAP = 0.055
"""Least distance between two labels at line ends, as a share of the panel's height."""


class Curve(NamedTuple):
    """Effects along an axis."""

    name: str
    x: Sequence[float]
    estimates: Sequence[EffectEstimate]


class Point(NamedTuple):
    """A named point with a vertical interval."""

    name: str
    x: float
    y: float
    low: float = math.nan
    high: float = math.nan
    group: str = ""


def line_figure(
    title: str,
    panels: dict[str, list[Curve]],
    x_label: str,
    y_label: str,
    ticks: Mapping[float, str] | None = None,
    linear_within: float | None = None,
) -> Figure:
    """Draw effects as lines with bands, one panel per name.

    Args:
        title: title of the figure.
        panels: lines by the panel's name.
        x_label: label of the horizontal axis.
        y_label: label of the vertical axis.
        ticks: names of positions on the horizontal axis; lines break where a whole position is
            left out. Default: the axis is numeric.
        linear_within: effects beyond this are drawn on a logarithmic scale, for effects that differ
            by orders of magnitude.
    """
    note = "Bands: 95 % intervals over seeds of this one model."
    if linear_within is not None:
        note += f" The scale is logarithmic beyond ±{linear_within:g}."
    with rc_context(STYLE):
        figure = _figure(title, len(panels), note)
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for panel, (name, lines) in zip(axes, panels.items(), strict=True):
            panel.set_title(name, loc="left")
            panel.axhline(0, color=GREY, linewidth=1, zorder=1)
            for line, colour, marker, dash in zip(
                lines, cycle(COLOURS), cycle(MARKERS), cycle(DASHES), strict=False
            ):
                _draw_curve(panel, line, colour, marker, dash, broken=ticks is not None)
            if ticks is not None:
                panel.set_xticks(list(ticks), list(ticks.values()))
            panel.set_xlabel(x_label)
            panel.grid(axis="y", color="#e6e6e6", linewidth=0.7)
            panel.margins(x=0.04)
        if linear_within is not None:
            axes[0].set_yscale("symlog", linthresh=linear_within)  # panels share the scale
            axes[0].yaxis.set_major_formatter(lambda effect, _: f"{effect:g}")
        axes[0].set_ylabel(y_label)
        for panel, lines in zip(axes, panels.values(), strict=True):
            _end_labels(panel, lines)
    return figure


def _draw_curve(
    panel: Axes, line: Curve, colour: str, marker: str, dash: Any, broken: bool
) -> None:
    x = np.asarray(line.x, dtype=np.float64)
    values = np.array(
        [[each.effect, each.low, each.high] for each in line.estimates], dtype=np.float64
    )
    gaps = np.flatnonzero((np.diff(x) > 1) & broken) + 1
    x, values = np.insert(x, gaps, np.nan), np.insert(values, gaps, np.nan, axis=0)
    effects, low, high = values.T
    panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    panel.plot(x, effects, color=colour, marker=marker, linestyle=dash, markersize=4.5, lw=1.4)


def _end_labels(panel: Axes, lines: list[Curve]) -> None:
    """Write names to the right of the last points, moved apart where they would overlap."""
    ends = []
    for line, colour in zip(lines, cycle(COLOURS), strict=False):
        known = [
            (x, each.effect)
            for x, each in zip(line.x, line.estimates, strict=True)
            if math.isfinite(each.effect)
        ]
        if known:
            ends.append((known[-1][1], known[-1][0], line.name, colour))
    panel.get_ylim()  # matplotlib sets the limits lazily
    height = (panel.transData - panel.transAxes).transform
    place = -math.inf
    for y, x, name, colour in sorted(ends):
        place = max(float(height((x, y))[1]), place + LABEL_GAP)
        panel.annotate(
            name,
            (x, y),
            xytext=(1.02, place),
            textcoords="axes fraction",
            color=colour,
            fontsize=8,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.5},
        )


def interval_figure(
    title: str,
    panels: dict[str, dict[str, EffectEstimate]],
    x_label: str,
    note: str = "Bars: 95 % intervals over seeds of this one model. Filled: shown (p by Holm).",
    directed: bool = True,
) -> Figure:
    """Draw effects with their intervals one below the other, one panel per name.

    Args:
        title: title of the figure.
        panels: effects by name, by the panel's name.
        x_label: label of the horizontal axis.
        note: caption.
        directed: whether one side of zero is better; then circles help and squares harm.
    """
    rows = max(len(panel) for panel in panels.values())
    height = max(PANEL[1], 0.28 * rows + 1.6)
    with rc_context(STYLE):
        figure = _figure(title, len(panels), note, height)
        axes = figure.subplots(1, len(panels), sharex=True, squeeze=False)[0]
        for panel, (name, estimates) in zip(axes, panels.items(), strict=True):
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
            panel.set_yticks(list(places), [textwrap.fill(label, 34) for label in estimates])
            panel.set_ylim(-0.6, len(estimates) - 0.4)
            panel.set_xlabel(x_label)
            panel.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    return figure


def point_figure(
    title: str,
    panels: dict[str, list[Point]],
    x_label: str,
    y_label: str,
    note: str = "Bars: 95 % intervals over seeds of this one model.",
) -> Figure:
    """Draw named points over a logarithmic axis, one panel per name.

    Groups differ in colour and marker. A name stands above its point's interval, or below it where
    it would overlap the name of a higher point.
    """
    with rc_context(STYLE):
        figure = _figure(title, len(panels), note)
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        groups = list(dict.fromkeys(point.group for points in panels.values() for point in points))
        places = [point.x for points in panels.values() for point in points]
        for panel, (name, points) in zip(axes, panels.items(), strict=True):
            panel.set_title(name, loc="left")
            for point in sorted(points, key=lambda point: -point.y):
                place = groups.index(point.group)
                colour = COLOURS[place % len(COLOURS)]
                if math.isfinite(point.low):
                    panel.plot([point.x, point.x], [point.low, point.high], color=colour, lw=1.2)
                panel.plot(
                    point.x, point.y, MARKERS[place % len(MARKERS)], color=colour, markersize=5
                )
                panel.annotate(
                    point.name,
                    (point.x, point.high if math.isfinite(point.high) else point.y),
                    xytext=(0, 5),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7,
                    color=colour,
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


def _figure(title: str, panels: int, note: str, height: float = PANEL[1]) -> Figure:
    return titled_figure(title, note, PANEL[0] * panels + 0.6, height)


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
