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
# Main contrast: data of all pruned generators against data of the dense one. If a pruned model
# writes equally good data, it can write the data for a cheaper, sparser one.
#
# Results: `python -m jobs run analysis/studies/generator.yaml --store STORE`. Set the store here or
# in the environment; `docs/studies.md` explains how a finding is made.

# %%
import os

from IPython.display import SVG

import analysis
from analysis.evidence import calibrated, scored
from analysis.figures import svg_bytes
from analysis.report import status_counts
from analysis.studies.generator import STUDY, generator_sparsity
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
# ## Means over seeds
#
# Mean perplexity over seeds, from the dense generator to the sparsest. The sparsity of the model
# that wrote the data is read from each cell's lineage.

# %%
rows = calibrated(scored(table))
rows = rows.assign(generator_sparsity=[generator_sparsity(each) for each in rows["lineage"]])
rows.pivot_table(
    index=["generator_sparsity", "source"], columns="method", values="value", observed=True
)

# %% [markdown]
# ## What it could still cost
#
# A difference that is not shown may still exist. For perplexity, `high` is the largest harm that
# the interval allows: choose a generator for which that much harm would be acceptable.

# %%
answer.numbers.sort_values("high")[["what", "effect", "high", "p", "seeds"]].round(3)

# %% [markdown]
# ## For your own model
#
# Copy the file below and put your model into `models` and your corpora into `corpora`. Any pruner
# can make a generator. The calibrations may have any names, but one generator must be dense. To
# leave out the filter, which uses each generator's own perplexity, add `drop_fraction: 0` to
# `cells`.

# %%
print(STUDY.grid_file.read_text())
