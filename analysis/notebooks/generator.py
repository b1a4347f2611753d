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
# writes as well, it can write the data for a cheaper, sparser one.
#
# Results: `python -m jobs run analysis/studies/generator.yaml --store STORE`. Set the store here or
# in the environment; `docs/studies.md` says how a finding is made.

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
# ## The levels behind it
#
# Mean perplexity over seeds, from the dense generator to the sparsest. The sparsity is that of the
# model that wrote the data, read from each cell's lineage.

# %%
rows = calibrated(scored(table))
rows = rows.assign(generator_sparsity=[generator_sparsity(told) for told in rows["lineage"]])
rows.pivot_table(
    index=["generator_sparsity", "source"], columns="method", values="value", observed=True
)

# %% [markdown]
# ## What it could still cost
#
# That no difference is shown is not that there is none. The end of an interval on the side of harm
# says how much a generator could still cost: take one where you could bear that much. With
# perplexity that is `high`.

# %%
answer.numbers.sort_values("high")[["what", "effect", "high", "p", "seeds"]].round(3)

# %% [markdown]
# ## Of your own model
#
# Copy the file below and put your model into `models` and your corpora into `corpora`. Any pruner
# that the grid knows can make a generator; their names are free, but one must be dense. To take out
# the filter, which uses each generator's own perplexity, add `drop_fraction: 0` to `cells`.

# %%
print(STUDY.grid_file.read_text())
