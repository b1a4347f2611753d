"""How long self-generation's prefixes should be, and whether that depends on the model's shape."""

import math
import re

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy import stats

from analysis.charts import titled_figure
from analysis.evidence import calibrated, scored
from analysis.figures import COLOURS, GREY, STYLE
from analysis.finding import declared_answer
from analysis.metrics import effect_text, interval_text, p_text
from analysis.statistics import CONFIDENCE, t_interval
from analysis.study import Answer, Results, Study

_PAPER = 2
"""Tokens of the paper's prefixes, the reference of the figure."""

_SHORT, _LONG = (1, 4), 16
"""The range that the paper found best, and the shortest long prefix."""

_PANELS_ACROSS = 3


def answer(results: Results) -> Answer:
    """Judge short prefixes against long ones, over trainings and over shapes."""
    title = "Perplexity after pruning, by the length of self-generation's prefixes"
    found = declared_answer(
        results,
        title,
        "Lengths are compared with Wanda at 60 %. The longest leaves a sample half of its tokens.",
    )
    rows = calibrated(scored(results.table))
    levels = rows[rows["calibration"] == "unfiltered"].pivot_table(
        index="model", columns="prefix_tokens", values="score"
    )
    shapes = pd.Series([re.sub(r"-\d+$", "", name) for name in levels.index], levels.index)
    lengths = np.asarray(levels.columns)
    short = levels.loc[:, (lengths >= _SHORT[0]) & (lengths <= _SHORT[1])].mean(axis=1)
    gains = short - levels.loc[:, lengths >= _LONG].mean(axis=1)
    between, rows = _between_shapes(gains, shapes)
    return found._replace(
        certainty=f"{found.certainty} {between}",
        figure=_figure(title, levels.sub(levels[_PAPER], axis=0), shapes),
        numbers=pd.concat([found.numbers, rows], ignore_index=True),
    )


def _between_shapes(
    gains: "pd.Series[float]", shapes: "pd.Series[str]"
) -> tuple[str, pd.DataFrame]:
    """Say what holds with the shape as unit, and whether shapes differ by more than trainings; and
    return the numbers.

    Args:
        gains: log perplexity of short minus long prefixes, by model.
        shapes: each model's shape.
    """
    groups = [own.to_numpy() for _, own in gains.groupby(shapes)]
    if len(groups) < 2 or len(groups) == len(gains):
        return "Whether shapes differ needs two of them, with two trainings.", pd.DataFrame()
    mean, low, high, p = t_interval([own.mean() for own in groups])
    effect, least, most = (100 * math.expm1(each) for each in (mean, low, high))
    f, p_shapes = stats.f_oneway(*groups)
    shown = "It is" if p_shapes < 1 - CONFIDENCE else "It is not"
    interval = f"{effect_text(effect, math.nan, math.nan, '%')} (95 % interval "
    interval += interval_text(least, most, "%")
    text = (
        f"With the shape as unit, short against long: {interval}; p {_equals(p)}; {len(groups)} "
        f"shapes). {shown} shown that shapes differ by more than trainings of one (F = {f:.1f}, "
        f"p {_equals(float(p_shapes))})."
    )
    row = {"what": "short against long, shapes as units", "effect": effect, "low": least}
    row |= {"high": most, "p": p, "unit": "%", "models": len(groups)}
    return text, pd.DataFrame([row])


def _equals(p: float) -> str:
    text = p_text(p)
    return text if text.startswith("<") else f"= {text}"


def _figure(title: str, changes: pd.DataFrame, shapes: "pd.Series[str]") -> Figure:
    """Draw a panel for each shape, with its trainings, and one for all shapes."""
    panels = {str(shape): own for shape, own in changes.groupby(shapes, sort=False)}
    panels["all shapes"] = changes.groupby(shapes).mean()
    down = math.ceil(len(panels) / _PANELS_ACROSS)
    note = "Thin: each training, mean of its draws (last panel: each shape). Thick: their mean."
    with rc_context(STYLE):
        figure = titled_figure(title, note, 9.0, 2.2 * down)
        grid = figure.subplots(down, _PANELS_ACROSS, sharex=True, sharey=True, squeeze=False)
        axes = list(grid.flat)
        for panel, (name, lines) in zip(axes, panels.items(), strict=False):
            places = range(lines.shape[1])
            effects = 100 * np.expm1(lines.to_numpy(dtype=np.float64))
            mean = 100 * np.expm1(lines.mean().to_numpy(dtype=np.float64))
            panel.axhline(0, color=GREY, linewidth=1, zorder=1)
            panel.plot(places, effects.T, color=GREY, linewidth=0.8, alpha=0.7)
            panel.plot(places, mean, color=COLOURS[0], marker="o", markersize=4)
            panel.set_title(name, loc="left", fontsize=9)
            panel.set_xticks(places, [f"{length:g}" for length in lines.columns])
            panel.grid(axis="y", color="#e6e6e6", linewidth=0.7)
            panel.set_xlabel("tokens of a prefix")
            panel.set_ylabel(f"change against {_PAPER} (%)")
            panel.label_outer()
        for panel in axes[len(panels) :]:
            panel.set_visible(False)
    return figure


STUDY = Study(
    "prefix-length",
    "How long should the prefixes of self-generation be, and does that depend on the model?",
    "prefixes of 1 to 4 tokens against those of 16 and more",
    answer,
)
