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
# Main contrast: 16, 64 and 256 windows against 512. Windows cost memory and pruning time; beyond
# some number they gain nothing.
#
# Results: `python -m jobs run analysis/studies/amount.yaml --store STORE`. Set the store here or in
# the environment; `docs/studies.md` explains how a finding is made.

# %%
import os

import numpy as np
from IPython.display import Image

import analysis
from analysis.evidence import calibrated, scored
from analysis.figures import png_bytes
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
Image(png_bytes(answer.figure), retina=True)

# %%
answer.numbers.round(3)

# %% [markdown]
# ## Each model
#
# Change of perplexity against 512 windows, by model, in percent. Models are the replicates: where
# they disagree, the seeds of one model would not have shown it.

# %%
rows = calibrated(scored(table))
whole = rows[rows["seqlen"] == rows["seqlen"].max()]
levels = whole.pivot_table(
    index="model", columns=["pruner", "nsamples"], values="score", observed=True
)
most = levels.columns.get_level_values("nsamples").max()
against = levels.xs(most, level="nsamples", axis=1)
(100 * np.expm1(levels.sub(against, axis=1, level="pruner"))).round(1)

# %% [markdown]
# ## How much depends on the draw?
#
# The standard deviation over draws of a model, in percent. A few windows may be as good on average
# and still be a bad bet for a single pruning.

# %%
draws = whole.groupby(["pruner", "nsamples", "model"], observed=True)["score"].var()
(100 * np.sqrt(draws.groupby(["pruner", "nsamples"], observed=True).mean())).unstack().round(2)

# %% [markdown]
# ## For your own model
#
# Copy the file below and put your models and corpora into it. A wider model has more input
# directions to cover. Since all numbers are compared with the largest, keep one well above the
# number you use.

# %%
print(STUDY.grid_file.read_text())
