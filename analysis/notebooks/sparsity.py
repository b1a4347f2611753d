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
# # From which sparsity on does self-generated calibration data matter?
#
# Main contrast: unfiltered self-generated text against the mismatched corpus at each target. At low
# sparsity any text will do; the study finds where that ends.
#
# Results: `python -m jobs run analysis/studies/sparsity.yaml --store STORE`. Set the store here or
# in the environment; `docs/studies.md` explains how a finding is made.

# %%
import os

import numpy as np
from IPython.display import Image

import analysis
from analysis.evidence import calibrated, scored
from analysis.figures import png_bytes
from analysis.report import status_counts
from analysis.studies.sparsity import STUDY
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
# Change of perplexity against the mismatched corpus, by model, in percent. Models are the
# replicates: where they disagree, the seeds of one model would not have shown it.

# %%
rows = calibrated(scored(table))
levels = rows.pivot_table(
    index="model", columns=["method", "target", "calibration"], values="score", observed=True
)
swapped = levels.swaplevel(0, 2, axis=1).sort_index(axis=1)
(100 * np.expm1(swapped["self-generated"] - swapped["mismatched"])).round(1)

# %% [markdown]
# ## What pruning costs
#
# Mean perplexity, from the dense model on. An effect is worth as much as it saves of this harm; a
# large one can still be the better of two broken models.

# %%
scored(table).pivot_table(
    index=["method", "target"], columns="source", values="value", observed=True
).round(2)

# %% [markdown]
# ## For your own model
#
# Copy the file below and put your models into `models`, a corpus for calibration into `mismatched`,
# and held-out text of the models' use into `heldout`. One model gives findings of this one model.
# To save time, keep only the sparsities near the threshold.

# %%
print(STUDY.grid_file.read_text())
