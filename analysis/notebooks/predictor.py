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
# # Which cheap score of a calibration set predicts how well it prunes?
#
# Main contrast: the rank correlation of Min-K%++ with the harm by pruning. A score that predicts
# the harm saves pruning with every candidate.
#
# Results: `python -m jobs run analysis/studies/predictor.yaml --store STORE`. Set the store here or
# in the environment; `docs/studies.md` explains how a finding is made.

# %%
import os

import pandas as pd
from IPython.display import Image

import analysis
from analysis.figures import png_bytes
from analysis.report import status_counts
from analysis.studies import predictor
from analysis.studies.predictor import STUDY
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
# ## The sources
#
# A source is one point, averaged over seeds. Harm is the difference of perplexity from the mean of
# all sources, here averaged over pruners and sparsities. Below 0 a source is better than the mean.

# %%
sources = predictor.gathered(table)
scores = pd.DataFrame(sources.scores, index=sources.names)
scores.assign(harm=sources.kind.effect(sources.harm.mean(axis=1))).sort_values("harm").round(3)

# %% [markdown]
# ## Does one source carry the finding?
#
# The rank correlation of the score below, with one source left out. If it vanishes without one
# source, the score only distinguishes that source from the rest.

# %%
SCORE = "min_k_plus_plus"
without = {name: predictor.gathered(table[table["source"] != name]) for name in sources.names}
ranks = {
    name: predictor.rank_correlations(others.scores[SCORE], others.harm).mean()
    for name, others in without.items()
}
pd.Series(ranks).sort_values().round(2)

# %% [markdown]
# ## For your own model
#
# Copy the file below, keep `describe`, and name your candidate sources: at least five, better
# fifteen. Without the pretraining text leave out `reference`; the divergence is then not scored.
# After the run, `python -m jobs recommend CANDIDATES.yaml --store STORE` ranks new sources by the
# score that predicted best, without pruning.

# %%
print(STUDY.grid_file.read_text())
