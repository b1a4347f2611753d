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
# # When do the device-seconds that self-generation takes pay?
#
# Main contrast: the smallest generated set against the mismatched corpus. Corpora are free; text
# that the model writes costs its time.
#
# Results: `python -m jobs run analysis/studies/cost.yaml --store STORE`. Set the store here or in
# the environment; `docs/studies.md` says how a finding is made.

# %%
import os

from IPython.display import SVG

import analysis
from analysis.evidence import calibrated, scored
from analysis.figures import svg_bytes
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
SVG(svg_bytes(answer.figure))

# %%
answer.numbers.round(3)

# %% [markdown]
# ## Where the seconds go
#
# Medians over seeds, of all shards together. What a cell took from the store was made once, whoever
# used it.

# %%
rows = calibrated(scored(table))
seconds = rows.groupby(["method", "source"], observed=True)[SECONDS].median()
seconds.assign(total=seconds.sum(axis=1)).round(1)

# %% [markdown]
# ## A set that is used again
#
# One set serves every pruner, sparsity and pattern of a model. Seconds of each pruning if so many
# share it: change the number to that of your own grid.

# %%
PRUNINGS = 10
made = seconds["seconds_generate"] + seconds["seconds_score"]
(seconds["seconds_prune"] + made / PRUNINGS).unstack("source").round(1)

# %% [markdown]
# ## What they buy
#
# The largest set against the corpus, pruner by pruner. Beside the table above, it says whether a
# dearer pruner or generated data is the better use of the same seconds.

# %%
generated = rows[rows["calibration"] == "self-generated"]
largest = generated[generated["num_samples"] == generated["num_samples"].max()]
analysis.compare_selections(largest, rows[rows["calibration"] == "mismatched"])[
    ["method", "target", "pairs", "effect", "low", "high", "unit", "p_holm"]
]

# %% [markdown]
# ## Of your own model
#
# Copy the file below and put your model into `models` and the corpus that you would use into
# `mismatched`. Run it on the machine that you ask about: seconds are those of the run. Generate
# with vLLM where you can, since that is where the seconds go, and choose `num_samples` around what
# you can pay.

# %%
print(STUDY.grid_file.read_text())
