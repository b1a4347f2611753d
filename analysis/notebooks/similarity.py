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
# # Must calibration data cover all kinds of the pretraining text, or hold nothing else?
#
# Main contrast: two of the five kinds against all five with half unseen text. The first is nearer
# to the pretraining text, the second covers it.
#
# Results: `python -m jobs run analysis/studies/similarity.yaml --store STORE`. Set the store here
# or in the environment; `docs/studies.md` explains how a finding is made.

# %%
import os

import numpy as np
from IPython.display import Image

import analysis
from analysis.evidence import calibrated
from analysis.figures import png_bytes
from analysis.report import status_counts
from analysis.studies.similarity import STUDY
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
# ## Levels
#
# Mean perplexity over models and draws, of each kind of held-out text. Read down a column: what a
# kind loses where the calibration data lacks it, and where it is diluted.

# %%
texts = table[table["metric"] == "perplexity"]
texts.pivot_table(index="calibration", columns="task", values="value", observed=True).round(2)

# %% [markdown]
# ## Each model
#
# Change against all five kinds, in percent, averaged over the kinds of the pretraining text. Models
# are the replicates.

# %%
seen = calibrated(texts[texts["task"] != "unseen-heldout"])
logs = seen.assign(score=np.log(seen["value"]))
levels = logs.pivot_table(index="model", columns="calibration", values="score", observed=True)
(100 * np.expm1(levels.sub(levels["five-kinds"], axis=0))).round(1)

# %% [markdown]
# ## For your own model
#
# The testbed's pretraining text is known. Of your own model it can only be guessed: take kinds of
# text that you believe were in it for the corpora, and one whose kind or date excludes it for
# `unseen`. The predictor study asks which score measures nearness where nothing is known.

# %%
print(STUDY.grid_file.read_text())
