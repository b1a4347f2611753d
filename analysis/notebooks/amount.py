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
# # How many windows of calibration data are enough, and how long should they be?
#
# Main contrast: 64 windows against the most. Windows cost memory and pruning time; beyond some
# number they gain nothing.
#
# Results: `python -m jobs run analysis/studies/amount.yaml --store STORE`. Set the store here or in
# the environment; `docs/studies.md` explains how a finding is made.

# %%
import os

from IPython.display import SVG

import analysis
from analysis.evidence import calibrated, scored
from analysis.figures import svg_bytes
from analysis.report import status_counts
from analysis.studies.amount import STUDY
from analysis.study import run_study

STORE = os.environ.get("CALPRUNE_STORE", ".calprune")  # a folder, a URL or one Parquet file
GRID = os.environ.get("CALPRUNE_GRID") or STUDY.name

table = analysis.load_results(STORE, GRID)
status_counts(table)

# %% [markdown]
# ## The finding

# %%
answer = run_study(STUDY, STORE, GRID)
print(answer.paragraph)
SVG(svg_bytes(answer.figure))

# %%
answer.numbers.round(3)

# %% [markdown]
# ## Means over seeds
#
# Mean perplexity over seeds. `method` names the pruner with its number of windows and their length.

# %%
rows = calibrated(scored(table))
levels = analysis.summarize(rows)
levels.pivot_table(index="method", columns="source", values="mean", observed=True)

# %% [markdown]
# ## How much depends on the draw?
#
# The standard deviation over seeds, in percent of the mean. A few windows may be as good on average
# and still be a bad bet for a single pruning.

# %%
spread = levels.assign(percent=100 * levels["sd"] / levels["mean"])
spread.pivot_table(index="method", columns="source", values="percent", observed=True).round(2)

# %% [markdown]
# ## Any two numbers
#
# `compare_selections` pairs within a method, and the number of windows is part of the method. To
# compare two numbers, name the pruner in `by` instead.

# %%
whole = rows[rows["seqlen"] == rows["seqlen"].max()]
few, more = (whole[whole["nsamples"] == count] for count in (16, 64))
analysis.compare_selections(
    few, more, by=["model", "pruner", "target", "source", "task", "metric"]
)[["pruner", "source", "pairs", "effect", "low", "high", "unit", "p_holm"]]

# %% [markdown]
# ## For your own model
#
# Copy the file below and put your model into `models` and your corpora into `corpora`. A wider
# model has more input directions to cover. Since all numbers are compared with the largest, keep
# one well above the number you use. Windows of different lengths are compared at the same number,
# so shorter windows are less text.

# %%
print(STUDY.grid_file.read_text())
