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
# # How long should the prefixes of self-generation be, and does that depend on the model?
#
# Main contrast: prefixes of 1 to 4 tokens against those of 16 and more. A prefix is the real text
# that the model continues: the longer it is, the less of a sample is the model's own.
#
# Results: `python -m jobs run analysis/studies/prefix-length.yaml --store STORE`. Set the store
# here or in the environment; `docs/studies.md` explains how a finding is made.

# %%
import os

import numpy as np
import pandas as pd
from IPython.display import Image

import analysis
from analysis.evidence import calibrated, scored
from analysis.figures import png_bytes
from analysis.report import status_counts
from analysis.studies.prefix_length import STUDY
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
# Mean perplexity of each model over its draws. Compare within a row: models differ more than
# lengths do.

# %%
rows = calibrated(scored(table))
rows.pivot_table(index="model", columns="source", values="value", observed=True).round(2)

# %% [markdown]
# ## Short against long, by model
#
# Change by 2 tokens against 64, in percent. Trainings of one shape stand together: shapes differ
# only as far as they differ by more than these.

# %%
unfiltered = rows[rows["calibration"] == "unfiltered"]
levels = unfiltered.pivot_table(index="model", columns="prefix_tokens", values="score")
pd.DataFrame({"2 against 64 tokens": 100 * np.expm1(levels[2] - levels[64])}).round(1)

# %% [markdown]
# ## For your own model
#
# Copy the file below and put your models into `models`; names of trainings of one shape end in the
# number of the training. Use your own corpora for `prefixes` and for `perplexity`. Keep length 2
# and lengths of 16 and more; the longest must leave the model room to write.

# %%
print(STUDY.grid_file.read_text())
