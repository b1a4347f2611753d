"""Numbers of declared cells, arranged by model and calibration draw.

Differences and scores are on the metric's scale (perplexity: its logarithm), averaged over settings
and tasks. The model is the unit, since a claim is about models. With one model the unit is the
draw, and an interval is one of this model.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.crossed import Shared, Uncertainty, shared_part, uncertainty_of_mean
from analysis.design import RecordedFloor
from analysis.labels import DENSE
from analysis.load import TableError
from analysis.metrics import Values, metric_named


class Replicates(NamedTuple):
    """Numbers of models by draws: differences of a contrast, or scores of a candidate."""

    values: Values
    """`[models, draws]`; NaN where a result is lost or a model has fewer draws. Every model has a
    number."""

    crossed: bool = False
    """Whether a column is the same draw of data for all models."""

    windows: tuple[Values, ...] = ()
    """Each task's numbers of single windows or questions, `[models, draws, windows]`, NaN where
    `values` are."""

    @property
    def units(self) -> Values:
        """Means of models, `[models]`; with one model its draws, `[draws]`."""
        return self._by_unit(self.values)

    @property
    def draws(self) -> int:
        """Number of draws of a model, at most."""
        return int((~np.isnan(self.values)).sum(axis=1).max(initial=0))

    def uncertainty(self) -> Uncertainty:
        """Return how uncertain the mean over units is; there must be two or more."""
        shared: list[Shared] = []
        if self.windows:
            shared.append(shared_part([self._by_unit(table) for table in self.windows]))
        whole = self.values[:, ~np.isnan(self.values).any(axis=0)]
        if self.crossed and min(whole.shape) > 1:
            shared.append(shared_part([whole]))
        return uncertainty_of_mean(self.units, shared)

    def minus(self, other: "Replicates") -> "Replicates":
        """Return the differences from another candidate on the same models, draws and windows."""
        windows = zip(self.windows, other.windows, strict=True)
        differences = tuple(own - others for own, others in windows)
        return Replicates(self.values - other.values, self.crossed, differences)

    def _by_unit(self, numbers: Values) -> Values:
        known = ~np.isnan(self.values)
        if len(self.values) == 1:
            return np.asarray(numbers[0][known[0]])
        weights = known / known.sum(axis=1, keepdims=True)
        return np.asarray(np.einsum("md,md...->m...", weights, np.nan_to_num(numbers)))


class Arrangement:
    """Where a list of cells stands among settings, models and draws."""

    def __init__(self, cells: pd.DataFrame, settings: Sequence[int]) -> None:
        """Take `model` and `seed` of each cell, and the number of its setting."""
        seeds = cells["seed"].fillna(-1).astype(int)  # a cell without a seed is one draw
        models = cells["model"].astype(str).to_numpy()
        own = {str(model): sorted(set(part)) for model, part in seeds.groupby(models)}
        self.models = list(own)
        self.crossed = len(own) > 1 and len({tuple(each) for each in own.values()}) == 1
        ranks = [own[model].index(seed) for model, seed in zip(models, seeds, strict=True)]
        kinds = {setting: rank for rank, setting in enumerate(sorted(set(settings)))}
        places = [self.models.index(model) for model in models]
        self._index = ([kinds[setting] for setting in settings], places, ranks)
        self._shape = (len(kinds), len(own), max(map(len, own.values())))

    def averaged(self, numbers: Values) -> Values:
        """Return means over settings, `[cells, ...]` to `[models, draws, ...]`.

        A draw that lacks a setting is NaN: its mean could not be compared with others.
        """
        placed = np.full((*self._shape, *numbers.shape[1:]), np.nan)
        placed[self._index] = numbers
        return np.asarray(placed.mean(axis=0))

    def replicates(self, numbers: Values, windows: Sequence[Values]) -> Replicates:
        """Return the numbers by model and draw, without models that have no whole draw.

        Args:
            numbers: `[cells]`.
            windows: for each task `[cells, windows]`; none if they are not known.
        """
        values = self.averaged(numbers)
        kept = ~np.isnan(values).all(axis=1)
        tables = tuple(self.averaged(table)[kept] for table in windows)
        return Replicates(values[kept], self.crossed, tables)


class Numbers:
    """One metric of a grid's cells on its scale, with that of single windows where known."""

    def __init__(
        self,
        table: pd.DataFrame,
        metric: str,
        tasks: Sequence[str],
        requests: pd.DataFrame | None,
        asked_by: str,
    ) -> None:
        """Select the numbers.

        Args:
            table: as `load_results` returns it.
            metric: the metric.
            tasks: its tasks; empty for all.
            requests: as `load_requests` returns them.
            asked_by: the contrast's name, for errors.

        Raises:
            TableError: if no cell has the metric, or a task lacks it.
        """
        rows = table[(table["status"] == "ok") & (table["metric"] == metric)]
        self.tasks = list(tasks) or list(dict.fromkeys(rows["task"]))
        absent = [task for task in self.tasks if task not in set(rows["task"])]
        if absent or not self.tasks:
            raise TableError(
                f"{asked_by}: no cell has {metric} of {', '.join(absent) or 'any task'}"
            )
        self.kind = metric_named(metric)
        self._asked_by = asked_by
        self._cells = table.drop_duplicates("cell").set_index("cell")
        scaled = rows.assign(scaled=self.kind.scaled(rows["value"].to_numpy(dtype=np.float64)))
        self._scaled = scaled.pivot_table(index="cell", columns="task", values="scaled")
        self._windows = {} if requests is None else self._by_window(requests, metric)

    def cells(self, names: Sequence[str]) -> pd.DataFrame:
        """Return `model`, `seed` and `status` of cells.

        Raises:
            TableError: if the table lacks one.
        """
        absent = [name for name in names if name not in self._cells.index]
        if absent:
            raise TableError(
                f"{self._asked_by}: the table lacks {len(absent)} of its cells, such as "
                f"{absent[0]}: run the grid again, or gather it"
            )
        return self._cells.loc[list(names), ["model", "seed", "status"]]

    def values(self, names: Sequence[str]) -> Values:
        """Return each cell's mean over tasks, `[cells]`; NaN where one is lost."""
        values = self._scaled.reindex(index=list(names), columns=self.tasks).to_numpy(np.float64)
        return np.asarray(values.mean(axis=1))

    def windows(self, names: Sequence[str]) -> list[Values]:
        """Return each task's numbers of single windows, `[cells, windows]`; empty unless they are
        known of every cell with a result."""
        known = ~np.isnan(self.values(names))
        tables = [
            table.reindex(list(names)).to_numpy(np.float64) for table in self._windows.values()
        ]
        return [] if any(np.isnan(table[known]).any() for table in tables) else tables

    def dense(self, models: Sequence[str]) -> float:
        """Return the mean of dense models over tasks; NaN if one is not measured."""
        dense = self._cells.index[self._cells["pruner"] == DENSE]
        chosen = [cell for cell in dense if self._cells.at[cell, "model"] in set(models)]
        return float(np.mean(self.values(chosen))) if len(chosen) == len(set(models)) else np.nan

    def unusable(self, level: float, models: Sequence[str], floor: RecordedFloor) -> bool:
        """Whether a mean lies beyond the floor of use. Levels of tasks are averaged as it is."""
        limits = []
        if floor.times_dense is not None and self.kind.lower_is_better:
            dense = self.kind.unscaled(self.dense(models))
            limits.append(float(self.kind.scaled(np.asarray(floor.times_dense * dense))))
        if all(task in floor.levels for task in self.tasks):
            given = np.array([floor.levels[task] for task in self.tasks])
            limits.append(float(self.kind.scaled(given).mean()))
        sign = 1 if self.kind.lower_is_better else -1
        return any(sign * (level - limit) >= 0 for limit in limits)

    def _by_window(self, requests: pd.DataFrame, metric: str) -> dict[str, pd.DataFrame]:
        """Return `[cells, windows]` of each task; empty if a task lacks them.

        Of a metric that is a window's loss on another scale, the results hold the loss in nats a
        token; it is scaled so that the mean over windows is the cell's number.
        """
        from_loss = self.kind.is_perplexity or metric == "bits_per_byte"
        found: dict[str, pd.DataFrame] = {}
        for task in self.tasks:
            name = "loss" if from_loss else metric
            rows = requests[(requests["task"] == task) & (requests["metric"] == name)]
            by: Any = rows.pivot_table(index="cell", columns="doc_id", values="value")
            by = by.dropna(axis=1)
            if by.shape[1] < 2:
                return {}
            if from_loss:
                by = by.mul(self._scaled[task].reindex(by.index) / by.mean(axis=1), axis=0)
            found[task] = by
        return found
