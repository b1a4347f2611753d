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
# # Do calibration data matter to quantizers and to refitted weights on a real model?
#
# Main contrast: a mismatched corpus, Python code, against a mixture with each compressor. Masks of
# Wanda, the same masks with refitted weights, SparseGPT, AWQ and GPTQ.
#
# Results: `python -m jobs run analysis/studies/real-compressors.yaml --store STORE`.
# Set the store here or in the environment; `docs/studies.md` explains how a finding is made.

# %%
import os

from IPython.display import Image

import analysis
from analysis.figures import png_bytes
from analysis.report import status_counts
from analysis.studies.real_compressors import STUDY
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
# ## Each text
#
# Means over draws. Lower is better, but for an accuracy.

# %%
pruned = table[table["calibration"] != "none"]
pruned.pivot_table(
    index=["method", "target", "calibration"],
    columns=["metric", "task"],
    values="value",
    observed=True,
).round(3)

# %% [markdown]
# ## What is left of the worst text
#
# In percent of the dense model's.

# %%
worst = analysis.worst_retained(analysis.retention(table))
worst.groupby(["source", "method", "worst"], observed=True)["retained"].agg(["mean", "size"])

# %% [markdown]
# ## For your own model
#
# Copy the file below and put your model into `models` and your texts into `corpora`. One model
# gives findings of this one model.

# %%
print(STUDY.grid_file.read_text())
