"""The answer in one figure: what pruning costs each text, by calibration data."""

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from analysis.advice import METRIC
from analysis.charts import titled_figure
from analysis.figures import STYLE
from analysis.labels import DENSE, NO_CALIBRATION, grid_notes, in_order
from analysis.statistics import measured

NO_DATA = "no data (magnitude)"
CELL_INCHES = (0.95, 0.34)
_LABEL_INCHES = 1.6
BETWEEN_INCHES = 0.35
_COLOURS = "YlOrBr"


def overview_figure(table: pd.DataFrame, model: str) -> Figure | None:
    """Draw bits per byte above the dense model, as means over seeds.

    Each pruner and target has a panel, each calibration a row, each text a column. The best
    calibration of each column is bold. The grid's notes stand below.

    Args:
        table: one grid's results.
        model: model to show.

    Returns:
        The figure; None if the dense model or every calibrated pruner lacks the metric.
    """
    costs = _costs(table, model)
    if costs is None:
        return None
    panels = list(costs.groupby(["method", "target"], observed=True, sort=True))
    texts = in_order(costs["task"])
    sources = list(dict.fromkeys(costs["row"].sort_values()))
    width = _LABEL_INCHES + len(panels) * (len(texts) * CELL_INCHES[0] + BETWEEN_INCHES)
    height = (len(sources) + 1) * CELL_INCHES[1]
    calibrated = costs.loc[costs["row"] != NO_DATA, "cost"]
    highest = float(calibrated.max())
    title = f"{model}: bits per byte lost on held-out text, by calibration data"
    caption = " ".join([*grid_notes(table), "Mean over seeds; bold: the best of a column."])
    with rc_context(STYLE):
        figure = titled_figure(title, caption, width, height + 0.6)
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for panel, ((method, target), rows) in zip(axes, panels, strict=True):
            panel.set_title(f"{method} {target}", loc="left")
            matrix = rows.pivot_table(index="row", columns="task", values="cost", observed=True)
            _matrix(panel, matrix.reindex(index=sources, columns=texts), highest)
    return figure


def _costs(table: pd.DataFrame, model: str) -> pd.DataFrame | None:
    """Return `method`, `target`, `row`, `task` and `cost`; magnitude without data is repeated in
    every panel of its target."""
    rows = measured(table)
    rows = rows[(rows["metric"] == METRIC) & (rows["model"] == model)]
    dense = rows[rows["pruner"] == DENSE].set_index("task")["value"]
    calibrated = rows[rows["calibration"] != NO_CALIBRATION]
    if dense.empty or calibrated.empty:
        return None
    without_data = rows[(rows["pruner"] == "magnitude") & (rows["calibration"] == NO_CALIBRATION)]
    settings = calibrated[["method", "target"]].drop_duplicates()
    repeated = without_data.drop(columns="method").merge(settings, on="target")
    order = [*in_order(calibrated["source"]), NO_DATA]
    both = pd.concat(
        [calibrated.assign(row=calibrated["source"].astype(str)), repeated.assign(row=NO_DATA)],
        ignore_index=True,
    )
    return both.assign(
        row=pd.Categorical(both["row"], order, ordered=True),
        cost=both["value"] - both["task"].map(dense),
    )


def _matrix(panel: Axes, matrix: pd.DataFrame, highest: float) -> None:
    """Draw one panel; its colours go from no loss to the highest loss of a calibrated pruner."""
    values = matrix.to_numpy(dtype=np.float64)
    panel.imshow(values, cmap=_COLOURS, norm=Normalize(0.0, highest), aspect="auto")
    calibrated = values[: -1 if NO_DATA in matrix.index else None]
    best = np.argmin(np.where(np.isnan(calibrated), np.inf, calibrated), axis=0)
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        shown = "failed" if np.isnan(value) else f"{value:+.3f}" if value < 10 else "> 10"
        dark = value > 0.6 * highest
        weight = "bold" if best[column] == row else "normal"
        colour = "white" if dark else "black"
        panel.text(column, row, shown, ha="center", va="center", color=colour, weight=weight)
    panel.set_xticks(range(len(matrix.columns)), [_short(name) for name in matrix.columns])
    panel.set_yticks(range(len(matrix.index)), list(matrix.index))
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)


def _short(text: str) -> str:
    return text.removesuffix("-heldout")
