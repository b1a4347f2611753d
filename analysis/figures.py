"""The report's figures: a metric against sparsity, and differences from a reference calibration.

Each source has a colour and a marker. Targets are categories: N:M patterns stand beside the
unstructured sparsities, not on top of them.
"""

import hashlib
import io
import math
import re
import textwrap
from collections.abc import Iterable
from itertools import cycle, islice
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from analysis.labels import DENSE, NO_CALIBRATION, in_order, targets_in_order
from analysis.load import TableError
from analysis.metrics import MetricKind, metric_named
from analysis.statistics import compare_with_reference, summarize

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6a3d9a", "#8c6d31")
"""Distinguishable with any colour vision, together with the markers. After Okabe and Ito."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
"""One more than colours, so that all pairs of colour and marker are used before one repeats."""

GREY = "#555555"
REFERENCE_STYLES: Any = (":", "-.", (0, (4, 1, 1, 1, 1, 1)))
PANELS_ACROSS = 3
PANEL_INCHES = (3.1, 2.9)
LEGEND_INCHES = 2.0
LABEL_INCHES = 0.22
PATTERN_GAP = 0.5
PNG_DPI = 160

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "svg.hashsalt": "calprune",
}


class Appearance(NamedTuple):
    """Colour and marker of a calibration source."""

    colour: str
    marker: str


class Limits(NamedTuple):
    """The vertical range of a figure's panels."""

    low: float
    high: float


def appearances(sources: Iterable[str]) -> dict[str, Appearance]:
    """Return the appearance of each source, by its position among all sources of a table."""
    ordered = in_order(sources)
    pairs = islice(zip(cycle(COLOURS), cycle(MARKERS), strict=False), len(ordered))
    return {source: Appearance(*pair) for source, pair in zip(ordered, pairs, strict=True)}


def target_places(levels: pd.DataFrame) -> dict[str, float]:
    """Return the horizontal position of each target: one apart, N:M patterns after a gap."""
    targets = targets_in_order(levels)
    unstructured = any(":" not in target for target in targets)
    return {
        target: place + (PATTERN_GAP if unstructured and ":" in target else 0.0)
        for place, target in enumerate(targets)
    }


def sparsity_figure(table: pd.DataFrame, model: str, task: str, metric: str) -> Figure:
    """Draw mean and standard deviation over seeds against sparsity, one panel per method.

    The dense model and pruners without data are horizontal lines. A pruner without data whose value
    is far from all calibrated ones is written at the panel's edge, so that the scale stays
    readable.

    Args:
        table: one grid's results, with failed and missing cells: the caption counts them.
        model: model to show.
        task: task of the metric.
        metric: metric to show.

    Raises:
        TableError: if the model has no such number.
    """
    rows = table[table["model"] == model]
    levels = summarize(rows[(rows["task"] == task) & (rows["metric"] == metric)])
    if levels.empty:
        raise TableError(f"{model} has no {metric} of {task}: name another model, task or metric")
    kind = metric_named(metric)
    calibrated = levels[levels["calibration"] != NO_CALIBRATION]
    without_data = levels[(levels["calibration"] == NO_CALIBRATION) & (levels["pruner"] != DENSE)]
    dense = levels.loc[levels["pruner"] == DENSE, "mean"]
    styles = appearances(rows.loc[rows["calibration"] != NO_CALIBRATION, "source"])
    shown = {source: styles[source] for source in in_order(calibrated["source"])}
    places = target_places(levels)
    limits = _limits(calibrated, without_data, dense, kind)
    panels = in_order(calibrated["method"]) or ["no calibrated pruner"]
    across = min(len(panels), PANELS_ACROSS)
    down = math.ceil(len(panels) / across)
    width = across * PANEL_INCHES[0] + LEGEND_INCHES
    with rc_context(STYLE):
        figure = Figure(figsize=(width, down * PANEL_INCHES[1] + 0.9))
        axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
        for panel, method in zip(axes.flat, panels, strict=False):
            panel.set_title(method, loc="left")
            _draw_references(panel, without_data, dense, places, limits, kind)
            _draw_sources(panel, calibrated[calibrated["method"] == method], shown, places)
        for empty in axes.flat[len(panels) :]:
            empty.set_visible(False)
        for column in range(across):
            lowest = axes[(len(panels) - 1 - column) // across, column]
            lowest.tick_params(labelbottom=True)
        _scale(axes[0, 0], places, limits, kind)
        figure.suptitle(f"{model}: {task}", x=0.012, ha="left", fontsize=12, fontweight="bold")
        figure.supylabel(_value_label(task, metric, kind), fontsize=9)
        names = _legend(figure, shown, without_data, not dense.empty)
        _place(figure, names, _caption(rows, calibrated, width), _target_label(levels))
    return figure


def difference_figure(
    table: pd.DataFrame, model: str, task: str, metric: str, reference: str
) -> Figure:
    """Draw each calibration's difference from the reference with its 95 % interval, one panel per
    method.

    Each row names target and source. A point is filled if its interval excludes 0, which is visible
    in grey too.

    Args:
        table: one grid's results.
        model: model to show.
        task: task of the metric.
        metric: metric to show.
        reference: a label in `source`.

    Raises:
        TableError: if there is nothing to compare.
    """
    rows = table[(table["model"] == model) & (table["task"] == task) & (table["metric"] == metric)]
    compared = compare_with_reference(rows, reference)
    if compared.empty:
        raise TableError(f"{model} has no {metric} of {task} to compare with {reference}")
    styles = appearances(rows.loc[rows["calibration"] != NO_CALIBRATION, "source"])
    methods = in_order(compared["method"])
    kind = metric_named(metric)
    most = max(int((compared["method"] == method).sum()) for method in methods)
    with rc_context(STYLE):
        figure = Figure(figsize=(2.2 + 3.6 * len(methods), 1.3 + 0.2 * most))
        axes = figure.subplots(1, len(methods), sharex=True, squeeze=False)[0]
        for panel, method in zip(axes, methods, strict=True):
            panel.set_title(method, loc="left")
            of_method = compared[compared["method"] == method].sort_values(["target", "source"])
            _draw_differences(panel, of_method, styles)
        axes[0].set_xlim(*_reach(compared))
        unit = "%" if kind.unit == "%" else f"{kind.unit or metric}"
        better = "left" if kind.lower_is_better else "right"
        figure.supxlabel(
            f"difference from {reference} in {unit} of {metric}: {better} is better. "
            "Bars: 95 % t interval over seeds\nof this one model, cut at the panel's edge; filled: "
            "it excludes 0",
            fontsize=8,
        )
        figure.suptitle(f"{model}: {task}", x=0.012, ha="left", fontsize=12, fontweight="bold")
        figure.set_layout_engine("constrained")
    return figure


def _reach(compared: pd.DataFrame) -> Limits:
    """Return limits that hold 0, all effects, and their intervals up to a readable width."""
    effects = np.append(compared["effect"].to_numpy(dtype=np.float64), 0.0)
    width = max(float(np.ptp(effects)), 1e-9)
    ends = compared[["low", "high"]].to_numpy(dtype=np.float64)
    ends = np.clip(ends[np.isfinite(ends)], effects.min() - width, effects.max() + width)
    every = np.append(effects, ends)
    margin = 0.06 * float(np.ptp(every))
    return Limits(float(every.min()) - margin, float(every.max()) + margin)


def _draw_differences(panel: Axes, compared: pd.DataFrame, styles: dict[str, Appearance]) -> None:
    panel.axvline(0, color=GREY, linewidth=1, linestyle="--", zorder=1)
    labels = []
    for place, row in enumerate(compared.to_dict("records")):
        style = styles[str(row["source"])]
        low, high = float(row["low"]), float(row["high"])
        sure = low > 0 or high < 0
        ends = [[0.0], [0.0]]
        if np.isfinite([low, high]).all():
            ends = [[row["effect"] - low], [high - row["effect"]]]
        panel.errorbar(
            [row["effect"]],
            [place],
            xerr=ends,
            color=style.colour,
            marker=style.marker,
            markersize=6,
            markerfacecolor=style.colour if sure else "white",
            elinewidth=1.4,
            capsize=2.5,
            linestyle="none",
        )
        labels.append(f"{row['target']}  {textwrap.shorten(str(row['source']), 34)}")
    panel.set_yticks(range(len(labels)), labels)
    panel.set_ylim(len(labels) - 0.4, -0.6)
    panel.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(axis="y", length=0)


def png_bytes(figure: Figure) -> bytes:
    """Return the figure as PNG; equal figures give equal bytes."""
    return _saved(figure, "png", {"Software": None}, PNG_DPI)


def svg_bytes(figure: Figure) -> bytes:
    """Return the figure as SVG with text as outlines; equal figures give equal bytes."""
    return _with_stable_clips(_saved(figure, "svg", {"Date": None, "Creator": None}, 72).decode())


def _with_stable_clips(svg: str) -> bytes:
    """Name the clips of an SVG by its other content.

    matplotlib names a clip by its unrounded box, whose last bits differ from draw to draw. A name
    still belongs to one figure, since a notebook puts several into one page.
    """
    names = re.findall(r'<clipPath id="(\w+)"', svg)

    def renamed(prefix: str) -> str:
        new = {name: f"{prefix}{place}" for place, name in enumerate(names)}
        return re.sub(r"\bp[0-9a-f]{10}\b", lambda match: new.get(match[0], match[0]), svg)

    digest = hashlib.sha256(renamed("").encode()).hexdigest()
    return renamed(f"clip-{digest[:10]}-").encode()


def _saved(figure: Figure, form: str, metadata: dict[str, Any], dpi: int) -> bytes:
    buffer = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format=form, metadata=metadata, dpi=dpi)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------- one panel


def _draw_sources(
    panel: Axes, levels: pd.DataFrame, shown: dict[str, Appearance], places: dict[str, float]
) -> None:
    """Draw points side by side around their target; lines join unstructured sparsities only."""
    step = min(0.14, 0.6 / max(len(shown), 1))
    for place, (source, style) in enumerate(shown.items()):
        rows = levels[levels["source"] == source].set_index("target")
        joined = [target for target in places if ":" not in target and target in rows.index]
        offset = (place - (len(shown) - 1) / 2) * step
        panel.plot(
            [places[target] + offset for target in joined],
            rows.loc[joined, "mean"].to_numpy(),
            color=style.colour,
            linewidth=1,
            alpha=0.6,
        )
        panel.errorbar(
            [places[target] + offset for target in rows.index],
            rows["mean"],
            yerr=rows["sd"].fillna(0.0),
            color=style.colour,
            marker=style.marker,
            markersize=5,
            markeredgecolor="white",
            markeredgewidth=0.5,
            linestyle="none",
            elinewidth=1.2,
            capsize=2,
            zorder=3,
        )


def _draw_references(
    panel: Axes,
    without_data: pd.DataFrame,
    dense: "pd.Series[float]",
    places: dict[str, float],
    limits: Limits,
    kind: MetricKind,
) -> None:
    for value in dense:
        panel.axhline(value, color=GREY, linewidth=1, linestyle="--", zorder=1)
    for style, method in zip(
        cycle(REFERENCE_STYLES), in_order(without_data["method"]), strict=False
    ):
        for row in without_data[without_data["method"] == method].itertuples():
            place, value = places[str(row.target)], float(str(row.mean))
            if limits.low <= value <= limits.high:
                panel.hlines(
                    value, place - 0.42, place + 0.42, GREY, linestyles=style, lw=1.4, zorder=1
                )
            else:
                _write_at_edge(panel, place, value, limits, kind)


def _write_at_edge(
    panel: Axes, place: float, value: float, limits: Limits, kind: MetricKind
) -> None:
    above = value > limits.high
    text = f"{100 * value:.0f}" if kind.is_share else _plain(value)
    panel.annotate(
        f"{'↑' if above else '↓'} {text}",
        (place, limits.high if above else limits.low),
        xytext=(0, -1 if above else 1),
        textcoords="offset points",
        ha="center",
        va="top" if above else "bottom",
        fontsize=7,
        color=GREY,
    )


def _limits(
    calibrated: pd.DataFrame,
    without_data: pd.DataFrame,
    dense: "pd.Series[float]",
    kind: MetricKind,
) -> Limits:
    """Return limits that hold the calibrated values, the dense level, and others nearby."""
    spread = calibrated["sd"].fillna(0.0)
    ends = [calibrated["mean"] - spread, calibrated["mean"] + spread, dense]
    scaled = _finite(np.concatenate(ends), kind)
    others = _finite(without_data["mean"].to_numpy(), kind)
    core = scaled if not calibrated.empty else np.concatenate([scaled, others])
    low, high = float(core.min()), float(core.max())
    reach = 0.4 * (high - low)
    near = [*core, *others[(others > low - reach) & (others < high + reach)]]
    low, high = float(min(near)), float(max(near))
    margin = max(0.1 * (high - low), 0.01)
    low, high = low - margin, high + margin
    return Limits(*np.exp([low, high])) if kind.is_perplexity else Limits(low, high)


def _finite(values: Any, kind: MetricKind) -> Any:
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = kind.scaled(np.asarray(values, dtype=np.float64))
    return scaled[np.isfinite(scaled)]


def _scale(panel: Axes, places: dict[str, float], limits: Limits, kind: MetricKind) -> None:
    """Set the scales and ticks, which all panels share."""
    if kind.is_perplexity:
        panel.set_yscale("log", nonpositive="clip")
        ratio = limits.high / limits.low
        if ratio < 5:
            panel.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        else:
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 500 else (1,)))
        panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(
        FuncFormatter(lambda y, _: f"{100 * y:g}" if kind.is_share else _plain(y))
    )
    panel.set_ylim(*limits)
    panel.set_xticks(list(places.values()), list(places))
    panel.set_xlim(-0.5, max(places.values(), default=0.0) + 0.5)
    figure = panel.figure
    for each in figure.axes:
        each.grid(axis="y", color="#e6e6e6", linewidth=0.7)
        each.set_axisbelow(True)


def _plain(value: float) -> str:
    return f"{value:,.4g}" if value < 1e4 else f"{value:.0e}".replace("e+0", "e")


# ----------------------------------------------------------------------------------- around them


def _value_label(task: str, metric: str, kind: MetricKind) -> str:
    better = "lower is better" if kind.lower_is_better else "higher is better"
    if kind.is_perplexity:
        return f"{metric} per token on {task}\n(log scale, {better})"
    return f"{metric} on {task}{' (%)' if kind.is_share else ''}\n({better})"


def _legend(
    figure: Figure, shown: dict[str, Appearance], without_data: pd.DataFrame, has_dense: bool
) -> Any:
    handles = [
        Line2D([], [], color=style.colour, marker=style.marker, markersize=5, linewidth=1)
        for style in shown.values()
    ]
    names = list(shown)
    for style, method in zip(
        cycle(REFERENCE_STYLES), in_order(without_data["method"]), strict=False
    ):
        handles.append(Line2D([], [], color=GREY, linestyle=style, linewidth=1.4))
        names.append(f"{method} (no data)")
    if has_dense:
        handles.append(Line2D([], [], color=GREY, linestyle="--", linewidth=1))
        names.append("dense model")
    wrapped = [textwrap.fill(name, 26) for name in names]
    return figure.legend(
        handles, wrapped, title="calibration data", frameon=False, alignment="left", fontsize=8
    )


def _caption(rows: pd.DataFrame, calibrated: pd.DataFrame, width_inches: float) -> str:
    seeds = calibrated["n"]
    sentences = []
    if not seeds.empty:
        few, many = int(seeds.min()), int(seeds.max())
        count = f"{many} seed{'s' if many > 1 else ''}" if few == many else f"{few} to {many} seeds"
        sentences.append(
            f"Mean over {count}" + ("; bars: ± standard deviation." if many > 1 else ".")
        )
    cells = rows.groupby("cell")["status"].first()
    for status, verb in (("failed", "failed"), ("missing", "did not run yet")):
        lost = int((cells == status).sum())
        if lost:
            sentences.append(f"Not shown: {lost} of {len(cells)} cells, which {verb}.")
    return textwrap.fill(" ".join(sentences), int(width_inches * 15))


def _target_label(levels: pd.DataFrame) -> str:
    label = "sparsity (% of pruned weights that are zero), or N:M pattern"
    return f"{label}, or bits of a weight" if levels["bits"].notna().any() else label


def _place(figure: Figure, legend: Any, caption: str, target_label: str) -> None:
    """Place the panels left of the legend and above the caption, without overlaps."""
    width, height = figure.get_size_inches()
    lines = caption.count("\n") + 1
    bottom = (0.12 + 0.15 * lines) / height
    figure.text(0.012, 0.06 / height, caption, fontsize=8, color=GREY, va="bottom")
    right = 1 - LEGEND_INCHES / width
    figure.supxlabel(target_label, x=right / 2, y=bottom, fontsize=9)
    panels = bottom + LABEL_INCHES / height
    figure.set_layout_engine("constrained", rect=(0, panels, right, 1 - panels))
    legend.set_loc("upper left")
    legend.set_bbox_to_anchor((right, 1 - 0.4 / height))
