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
# # Does calibration data of several sources keep a model's capabilities better than one source?
#
# Main contrast: mixed data against each single source, by the kind of text that is kept worst. A
# single source may keep its own kind and lose the others.
#
# Results: `python -m jobs run analysis/studies/mixing.yaml --store STORE`. Set the store here or in
# the environment; `docs/studies.md` explains how a finding is made.

# %%
import os

from IPython.display import Image

import analysis
from analysis.figures import png_bytes
from analysis.report import status_counts
from analysis.studies.mixing import STUDY
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
# ## The matrix
#
# What each source retains of each kind of text, in percent of the dense model's, averaged over
# models and draws. The row whose worst kind is best is the safe choice.

# %%
retained = analysis.retention(table)
matrix = retained.pivot_table(
    index="source", columns="capability", values="retained", observed=True
)
matrix.assign(worst=matrix.min(axis=1)).sort_values("worst", ascending=False).round(1)

# %% [markdown]
# ## Each model
#
# What is left of the worst kind, by model. Models are the replicates: do they agree?

# %%
worst = analysis.worst_retained(retained)
worst.pivot_table(index="model", columns="source", values="retained", observed=True).round(1)

# %%
worst.groupby(["source", "worst"], observed=True).size().unstack(fill_value=0)

# %% [markdown]
# ## For your own model
#
# Copy the file below, put your models into `models`, and give each kind of text a corpus and a
# held-out text. Give the mixture the shares of your use case. With tasks under `evaluate`,
# `worst_retained` counts them too, each above chance.

# %%
print(STUDY.grid_file.read_text())
