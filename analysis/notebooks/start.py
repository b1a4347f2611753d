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
# # Which calibration data prunes this model best?
#
# This notebook reads a grid's results from a store and goes from the table to an answer. Open it in
# Jupyter with jupytext, or run `jupytext --to ipynb start.py`. Set the store here or in the
# environment: a folder, `s3://bucket/store`, or one Parquet file.

# %%
import os

from IPython.display import SVG

import analysis
from analysis.figures import difference_figure, sparsity_figure, svg_bytes
from analysis.labels import NO_CALIBRATION, in_order
from analysis.tables import headline_metrics

STORE = os.environ.get("CALPRUNE_STORE", ".calprune")
GRID = os.environ.get("CALPRUNE_GRID") or None  # None reads all grids of the store
REFERENCE = os.environ.get("CALPRUNE_REFERENCE") or None  # None takes the first corpus

# %% [markdown]
# ## The table
#
# One row per cell, task and metric. Cells that failed or have not run are rows too.

# %%
table = analysis.load_results(STORE, GRID)
table.drop_duplicates(["grid", "cell"])["status"].value_counts()

# %%
table.loc[table["status"] != "ok", ["cell", "model", "method", "target", "source", "seed", "error"]]

# %% [markdown]
# One row per cell, one column per metric:

# %%
analysis.wide(table).drop(columns=["lineage", "versions", "prune_report", "traceback"])

# %% [markdown]
# ## The main metric
#
# The first perplexity, else the first metric. Change it here.

# %%
task, metric = headline_metrics(analysis.with_mean_accuracy(table))[0]
rows = analysis.with_mean_accuracy(table)
rows = rows[(rows["task"] == task) & (rows["metric"] == metric)]
calibrated = rows[rows["calibration"] != NO_CALIBRATION]
model = in_order(calibrated["model"])[0]
reference = REFERENCE or in_order(calibrated["source"])[0]
f"{task}: {metric} of {model}, against {reference}"

# %%
levels = analysis.summarize(rows)
levels.pivot_table(
    index=["model", "method", "target"], columns="source", values="mean", observed=True
)

# %%
SVG(svg_bytes(sparsity_figure(table, model, task, metric)))

# %% [markdown]
# ## How certain is it?
#
# Differences from the reference, paired by seed. `p_holm` is corrected for all rows of a table. An
# interval of two or three seeds is wide because so few seeds determine little.

# %%
others = [source for source in in_order(calibrated["source"]) if source != reference]
compared = {
    source: analysis.compare_selections(
        rows[rows["source"] == source], rows[rows["source"] == reference]
    ).query("n_a > 0")
    for source in others
}
for source, rows_of_source in compared.items():
    print(source, "against", reference)
    columns = ["method", "target", "pairs", "lost_a", "effect", "low", "high", "unit", "p_holm"]
    print(rows_of_source[columns].to_string(index=False))

# %%
SVG(svg_bytes(difference_figure(table, model, task, metric, reference)))

# %% [markdown]
# ## Request by request
#
# Where the evaluations kept per-request results, compare two calibrations question by question:
# pass two selections of `analysis.load_requests(STORE, table)` to `analysis.compare_selections`.

# %% [markdown]
# ## Beside published numbers

# %%
analysis.paper_table(table)
