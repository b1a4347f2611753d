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
# # When do the device-seconds spent on self-generation pay off?
#
# Main contrast: generated sets of three sizes against the mismatched corpus. A corpus is free; text
# that the model writes costs device time.
#
# Results: `python -m jobs run analysis/studies/cost.yaml --store STORE`. Set the store here or in
# the environment; `docs/studies.md` explains how a finding is made.

# %%
import os

from IPython.display import Image

import analysis
from analysis.evidence import calibrated, scored
from analysis.figures import png_bytes
from analysis.report import status_counts
from analysis.studies.cost import SECONDS, STUDY
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
# ## Where the seconds go
#
# Medians over models and draws, summed over shards. An artifact that several cells share was made
# once, but counts for each.

# %%
rows = calibrated(scored(table))
seconds = rows.groupby(["method", "source"], observed=True)[SECONDS].median()
seconds.assign(total=seconds.sum(axis=1)).round(1)

# %% [markdown]
# ## A set that is used again
#
# One set serves every pruner, sparsity and pattern of a model. The table shows the seconds of each
# pruning if `PRUNINGS` of them share a set: change the number to that of your own grid.

# %%
PRUNINGS = 10
made = seconds["seconds_generate"] + seconds["seconds_score"]
(seconds["seconds_prune"] + made / PRUNINGS).unstack("source").round(1)

# %% [markdown]
# ## What the seconds buy
#
# Mean perplexity over models and draws. With the table above it shows whether a dearer pruner or
# generated data is the better use of the same seconds.

# %%
rows.pivot_table(index="source", columns="method", values="value", observed=True).round(3)

# %% [markdown]
# ## For your own model
#
# Copy the file below and put your models into `models` and the corpus that you would use into
# `mismatched`. Run it on the machine in question, since the seconds are those of the run. Most of
# them are spent on generation, so use vLLM if you can, and choose `num_samples` around what you can
# afford.

# %%
print(STUDY.grid_file.read_text())
