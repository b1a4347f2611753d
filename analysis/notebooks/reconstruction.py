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
# # Do fitted weights make up for a cheap mask, and which data do they need?
#
# Main contrast: reconstructed Wanda against SparseGPT and ALPS; its two sets apart. Its sets are
# the one that chose the mask, and the one that the weights are fitted to.
#
# Results: `python -m jobs run analysis/studies/reconstruction.yaml --store STORE`. Set the store
# here or in the environment; `docs/studies.md` explains how a finding is made.

# %%
import os

import numpy as np
from IPython.display import Image

import analysis
from analysis.evidence import calibrated, scored
from analysis.figures import png_bytes
from analysis.report import status_counts
from analysis.studies.reconstruction import STUDY
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
# ## Every pruner with every set
#
# Mean perplexity, from the dense model on. The columns are the sets that chose the masks; a method
# names the set of its fit where that is another.

# %%
scored(table).pivot_table(
    index=["method", "target"], columns="source", values="value", observed=True
).round(3)

# %% [markdown]
# ## Each model
#
# Change of perplexity against the mismatched corpus, by model, in percent. Models are the
# replicates: where they disagree, the seeds of one model would not have shown it.

# %%
by_model = calibrated(scored(table)).pivot_table(
    index="model", columns=["method", "target", "calibration"], values="score", observed=True
)
swapped = by_model.swaplevel(0, 2, axis=1).sort_index(axis=1)
(100 * np.expm1(swapped["self-generated"] - swapped["mismatched"])).round(1)

# %% [markdown]
# ## For your own model
#
# Copy the file below and put your models into `models`, a corpus for calibration into `mismatched`,
# and held-out text of the models' use into `heldout`. One model gives findings of this one model.

# %%
print(STUDY.grid_file.read_text())
