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
# # Should generated text be filtered, and by what?
#
# Main contrast: dropping the fifth of highest perplexity against dropping a random fifth. Samples
# of high perplexity may be broken text, or rare text that the pruned model should keep.
#
# Results: `python -m jobs run analysis/studies/filter.yaml --store STORE`. Set the store here or in
# the environment; `docs/studies.md` explains how a finding is made.

# %%
import os

from IPython.display import Image

import analysis
from analysis.evidence import calibrated, scored
from analysis.figures import png_bytes
from analysis.report import status_counts
from analysis.studies.filter import STUDY
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
# Change of perplexity against no filter, by model. Models are the replicates: where they disagree,
# the seeds of one model do not show it.

# %%
rows = calibrated(scored(table))
levels = rows.pivot_table(index="model", columns="calibration", values="score", observed=True)
(100 * (levels.sub(levels["unfiltered"], axis=0))).round(1)

# %% [markdown]
# ## What is left of each kind of text
#
# The worst kind of each filter, in percent of the dense model's.

# %%
worst = analysis.worst_retained(analysis.retention(table))
worst.groupby(["source", "method", "worst"], observed=True)["retained"].agg(["mean", "size"])

# %% [markdown]
# ## For your own model
#
# Copy the file below and put your models into `models` and your corpora into `corpora`. One model
# gives findings of this one model. Try a higher `temperature` in the calibrations: hotter text
# gives a filter more to drop.

# %%
print(STUDY.grid_file.read_text())
