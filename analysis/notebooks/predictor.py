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
# # Which cheap score of a calibration set foretells how well it prunes?
#
# Main contrast: the rank correlation of Min-K%++ with the harm by pruning. A score that foretells
# the harm saves pruning with every candidate.
#
# Results: `python -m jobs run analysis/studies/predictor.yaml --store STORE`. Set the store here or
# in the environment; `docs/studies.md` says how a finding is made.

# %%
import os

import pandas as pd
from IPython.display import SVG

import analysis
from analysis.figures import svg_bytes
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
SVG(svg_bytes(answer.figure))

# %%
answer.numbers.round(3)

# %% [markdown]
# ## The sources behind it
#
# A source is one point, whatever the number of seeds. Harm is the change of perplexity against the
# mean of all sources, here averaged over pruners and sparsities; below 0 a source is better than
# most.

# %%
sources = predictor.gathered(table)
told = pd.DataFrame(sources.scores, index=sources.names)
told.assign(harm=sources.kind.effect(sources.harm.mean(axis=1))).sort_values("harm").round(3)

# %% [markdown]
# ## Does one source carry it?
#
# The rank correlation with one source left out, for the score named here. If it falls to nothing
# without one of them, the score tells that source from the rest and nothing more.

# %%
SCORE = "min_k_plus_plus"
without = {name: predictor.gathered(table[table["source"] != name]) for name in sources.names}
ranks = {
    name: predictor.rank_correlation(others.scores[SCORE], others.harm)
    for name, others in without.items()
}
pd.Series(ranks).sort_values().round(2)

# %% [markdown]
# ## Of your own model
#
# Copy the file below, keep `describe`, and name your candidate sources; five are the least, fifteen
# say something. Without the pretraining text leave out `reference`, and the divergence is not
# scored. Once it is run, `python -m jobs recommend CANDIDATES.yaml --store STORE` ranks new sources
# by the score that foretold best, and prunes nothing.

# %%
print(STUDY.grid_file.read_text())
