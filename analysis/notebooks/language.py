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
# # Which calibration data keeps which language of a model that has two?
#
# Main contrast: calibration in a language against calibration in the other, for each language's
# text. Calibration in one language may harm the other.
#
# Results: `python -m jobs run analysis/studies/language.yaml --store STORE`. Set the store here or
# in the environment; `docs/studies.md` explains how a finding is made.

# %%
import os

from IPython.display import Image

import analysis
from analysis.figures import png_bytes
from analysis.report import status_counts
from analysis.studies.language import STUDY
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
# ## Every calibration on every measure
#
# What is left of each language's text and questions, in percent of the dense model's: one row per
# calibration, its mean over models.

# %%
kept = analysis.retention(table)
kept.pivot_table(index="source", columns="capability", values="retained", observed=True).round(1)

# %% [markdown]
# ## Who pays?
#
# The capability of which each calibration leaves least, and in how many models it is that one.

# %%
worst = analysis.worst_retained(kept)
worst.groupby(["source", "worst"], observed=True)["retained"].agg(["mean", "size"]).round(1)

# %% [markdown]
# ## For your own model
#
# Copy the file below, put your models into `models`, and give each language a corpus, held-out text
# and tasks. Name your languages in the design. Try shares other than one half in the mixture.

# %%
print(STUDY.grid_file.read_text())
