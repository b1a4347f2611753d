# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From a model to an answer: which calibration data prunes it best?
#
# This notebook reads a grid's results from a store, in ten cells. `make demo` makes such a store
# with a small real language model. Open this file in Jupyter with jupytext, or run
# `jupytext --to ipynb start.py`.

# %%
import os

from IPython.display import Image

import analysis
from analysis.advice import advise
from analysis.figures import difference_figure, png_bytes, sparsity_figure
from analysis.labels import DENSE, NO_CALIBRATION, grid_notes, in_order
from analysis.metrics import metric_named
from analysis.overview import overview_figure
from analysis.tables import headline_metrics

STORE = os.environ.get("CALPRUNE_STORE", ".calprune")  # or s3://bucket/store, or a Parquet file
GRID = os.environ.get("CALPRUNE_GRID") or None  # None reads all grids of the store
REFERENCE = os.environ.get("CALPRUNE_REFERENCE") or None  # None takes the first corpus

# %% [markdown]
# ## The model, before pruning
#
# One row of the table is one number of one cell. The dense model is a cell too.

# %%
table = analysis.load_results(STORE, GRID)
model = in_order(table["model"])[0]
table.loc[
    (table["model"] == model) & (table["pruner"] == DENSE),
    ["model", "task", "metric", "value", "stderr", "samples"],
]

# %% [markdown]
# ## What was tried
#
# The numbers of cells, by calibration and setting.

# %%
cells = table[table["pruner"] != DENSE].drop_duplicates(["grid", "cell"])
cells.pivot_table(
    index=["method", "target"],
    columns="source",
    values="cell",
    aggfunc="count",
    observed=True,
    fill_value=0,
)

# %% [markdown]
# Cells that failed or have not run are rows too. Nothing below is taken from them.

# %%
lost = table[table["status"] != "ok"]
lost[["cell", "model", "method", "target", "source", "seed", "status", "error"]]

# %% [markdown]
# ## What pruning costs
#
# Bits per byte lost on each text where they were measured, else the first metric.

# %%
shown = analysis.with_mean_accuracy(table)
task, metric = headline_metrics(shown)[0]
figure = overview_figure(table, model) or sparsity_figure(table, model, task, metric)
Image(png_bytes(figure), retina=True)

# %% [markdown]
# ## The answer

# %%
for advice in advise(table):
    print(advice)
    print("cost:", advice.cost)
print(*grid_notes(table), sep="\n")

# %% [markdown]
# ## How certain is it?
#
# Differences from a reference, paired by seed. `p_holm` is corrected for all rows of a table. An
# interval of two or three seeds is wide because so few seeds determine little.

# %%
rows = shown[(shown["task"] == task) & (shown["metric"] == metric)]
calibrated = rows[rows["calibration"] != NO_CALIBRATION]
reference = REFERENCE or in_order(calibrated["source"])[0]
columns = ["method", "target", "pairs", "lost_a", "effect", "low", "high", "unit", "p_holm"]
for source in in_order(calibrated["source"]):
    if source != reference:
        compared = analysis.compare_selections(
            rows[rows["source"] == source], rows[rows["source"] == reference]
        )
        print(f"{source} against {reference}, {task}: {metric}")
        print(compared.query("n_a > 0")[columns].to_string(index=False))

# %%
Image(png_bytes(difference_figure(table, model, task, metric, reference)), retina=True)

# %% [markdown]
# ## What is left of each capability
#
# A mean hides a capability that is lost: here is the one that each setting retains least of, in
# percent of the dense model's.

# %%
analysis.worst_retained(analysis.retention(table)).drop(columns="grid").round(1)

# %% [markdown]
# ## Take it
#
# Write the best model as an ordinary checkpoint: `calprune best GRID --export FOLDER`, or
# `calprune export KEY FOLDER` with a `prune_key` of this list, the best number first. To look
# further, compare two calibrations question by question with `analysis.load_requests`, and a model
# with published numbers by `analysis.paper_table`.

# %%
best = calibrated.sort_values("value", ascending=metric_named(metric).lower_is_better)
best[["method", "target", "source", "seed", "value", "prune_key"]].head()
