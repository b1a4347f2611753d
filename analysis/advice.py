"""Recommend a calibration for each model, and say how certain that is, in one sentence."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis.labels import DENSE, NO_CALIBRATION, in_order
from analysis.metrics import duration_text
from analysis.statistics import CONFIDENCE, Interval, holm, measured, t_interval

METRIC = "bits_per_byte"
"""Metric that ranks calibrations: unlike perplexity, it is comparable across kinds of text."""

_SETTING = ["method", "target", "seed"]
"""Columns that two calibrations share when they are compared."""


class Rival(NamedTuple):
    """A calibration that is not the best, and its loss against the best."""

    source: str
    loss: Interval
    """In bits per byte, over settings."""
    p: float
    """For no loss; corrected for all rivals (Holm)."""
    worse_in: int
    """Number of settings in which it is worse."""

    @property
    def surely_worse(self) -> bool:
        """Whether the loss is significant."""
        return self.p < 1 - CONFIDENCE


class Advice(NamedTuple):
    """The best calibration of a model."""

    model: str
    source: str
    level: float
    """Bits per byte, averaged over texts and settings."""
    dense: float
    """Bits per byte of the dense model; NaN if it was not measured."""
    texts: int
    settings: int
    rivals: list[Rival]
    """One or more, the next best first."""
    left_out: list[str]
    """Calibrations that lack a number in a setting of the others."""
    data_seconds: float
    """To generate and score one calibration set, summed over shards; 0 for a corpus, NaN if not
    recorded."""
    prune_seconds: float
    """Of one pruning, on average; NaN if not recorded."""

    def __str__(self) -> str:
        return f"{self.model}: take {self.source}: {self.expectation}; {self.certainty}."

    @property
    def expectation(self) -> str:
        """What the calibration leaves."""
        dense = "" if np.isnan(self.dense) else f" (dense {self.dense:.3f})"
        over = f"{_counted(self.texts, 'text')} and {_counted(self.settings, 'setting')}"
        return f"averaged over {over} it leaves {self.level:.3f} bits per byte{dense}"

    @property
    def certainty(self) -> str:
        """How far it is ahead, and of which calibrations surely."""
        parts = [_against_next(self.rivals[0], self.settings), self._against_all]
        if self.left_out:
            parts.append(f"left out because numbers are missing: {', '.join(self.left_out)}")
        return "; ".join(parts)

    @property
    def _against_all(self) -> str:
        """Which calibrations it surely beats. This corrects for their number: the next best may not
        be among them although its own interval excludes zero."""
        claims = []
        for sure, words in ((True, "surely better than"), (False, "not surely better than")):
            names = [rival.source for rival in self.rivals if rival.surely_worse is sure]
            if names:
                claims.append(f"{words} {', '.join(names)}")
        at_once = f"with all {len(self.rivals)} compared at once " if len(self.rivals) > 1 else ""
        return at_once + ", ".join(claims)

    @property
    def cost(self) -> str:
        """Time for the data and for a pruning; empty if none was recorded."""
        spent = (
            (self.data_seconds, "to generate and score the calibration data"),
            (self.prune_seconds, "for each pruning"),
        )
        return ", ".join(f"{duration_text(seconds)} {of}" for seconds, of in spent if seconds > 0)


def advise(table: pd.DataFrame) -> list[Advice]:
    """Return the best calibration of each model that compares several, by bits per byte.

    Calibrations are compared setting by setting: one pruner, target and seed. Student's t over
    settings covers these settings, not other models or texts. P-values are corrected for all rivals
    (Holm). A calibration with a failed or missing cell cannot be the best.
    """
    rows = measured(table)
    rows = rows[rows["metric"] == METRIC]
    return [advice for model in in_order(rows["model"]) for advice in _advice(table, rows, model)]


def _advice(table: pd.DataFrame, rows: pd.DataFrame, model: str) -> Iterator[Advice]:
    own = rows[rows["model"] == model]
    texts = own["task"].nunique()
    calibrated = own[own["calibration"] != NO_CALIBRATION]
    levels = _levels(calibrated, [*_SETTING, "source"], texts).unstack("source")
    levels = levels.reindex(columns=in_order(calibrated["source"]))
    lost = set(_lost_sources(table, model))
    whole = [source for source in levels if source not in lost and levels[source].notna().all()]
    if len(whole) < 2:
        return
    means = levels[whole].mean().sort_values(kind="stable")
    best, *others = means.index
    differences = {source: (levels[source] - levels[best]).to_numpy() for source in others}
    losses = {source: t_interval(values) for source, values in differences.items()}
    corrected = holm([losses[source].p for source in others])
    dense = _levels(own[own["pruner"] == DENSE], ["cell"], texts)
    yield Advice(
        model=model,
        source=best,
        level=float(means[best]),
        dense=float(dense.mean()),
        texts=texts,
        settings=len(levels),
        rivals=[
            Rival(source, losses[source], float(p), int((differences[source] > 0).sum()))
            for source, p in zip(others, corrected, strict=True)
        ],
        left_out=[str(source) for source in levels if source not in whole],
        data_seconds=_mean_seconds(calibrated, best, ["seconds_generate", "seconds_score"]),
        prune_seconds=_mean_seconds(calibrated, best, ["seconds_prune"]),
    )


def _mean_seconds(rows: pd.DataFrame, source: str, columns: list[str]) -> float:
    """Return the mean over a calibration's cells of the sum of columns; NaN if all are empty."""
    cells = rows[rows["source"] == source].drop_duplicates(["grid", "cell"])
    return float(cells[columns].sum(axis=1, min_count=1).mean())


def _levels(rows: pd.DataFrame, by: list[str], texts: int) -> "pd.Series[float]":
    """Return means over texts; NaN where a text is missing."""
    groups = rows.groupby(by, observed=True, dropna=False)["value"]
    return groups.mean().where(groups.size() == texts)


def _lost_sources(table: pd.DataFrame, model: str) -> "pd.Series[str]":
    return table.loc[(table["model"] == model) & (table["status"] != "ok"), "source"]


def _against_next(rival: Rival, settings: int) -> str:
    loss = f"{rival.loss.mean:.3f} less than {rival.source}, the next best"
    if np.isnan(rival.loss.low):
        return f"{loss} (one setting: no interval)" if settings == 1 else f"{loss} (no interval)"
    percent = f"{100 * CONFIDENCE:.0f} %"
    interval = f"{percent} interval {rival.loss.low:.3f} to {rival.loss.high:.3f}"
    return f"{loss} ({interval}, ahead in {rival.worse_in} of {settings})"


def _counted(count: int, name: str) -> str:
    return f"{count} {name}" + ("" if count == 1 else "s")
