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
# # Does calibration data that a pruned version of the model writes prune as well as its own?
#
# Main contrast: unfiltered text of all pruned generators against that of the dense one. If a pruned
# model writes equally good data, it can write the data for a cheaper, sparser one.
#
# Results: `python -m jobs run analysis/studies/generator.yaml --store STORE`. Set the store here or
# in the environment; `docs/studies.md` explains how a finding is made.

# %%
import os

import numpy as np
from IPython.display import Image

import analysis
from analysis.evidence import calibrated, scored
from analysis.figures import png_bytes
from analysis.report import status_counts
from analysis.studies.generator import STUDY
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
# Change of perplexity against the dense generator, by model, in percent. Models are the replicates:
# where they disagree, the seeds of one model would not have shown it.

# %%
rows = calibrated(scored(table))
levels = rows.pivot_table(index="model", columns="calibration", values="score", observed=True)
(100 * np.expm1(levels.sub(levels["dense"], axis=0))).round(1)

# %% [markdown]
# ## What it could still cost
#
# A difference that is not shown may still exist. For perplexity, `high` is the largest harm that
# the interval allows: choose a generator for which that much harm would be acceptable.

# %%
contrasts = answer.numbers.dropna(subset="family_size").sort_values("high")
contrasts[["what", "verdict", "effect", "high", "p"]].round(3)

# %% [markdown]
# ## For your own model
#
# Copy the file below and put your models and corpora into it. Any pruner can make a generator. Name
# your generators in the design. With a filter, let one model score the text of all of them
# (`scorer`): a generator finds its own faults likely.

# %%
print(STUDY.grid_file.read_text())
