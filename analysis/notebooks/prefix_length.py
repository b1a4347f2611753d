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

from IPython.display import SVG

import analysis
from analysis.evidence import calibrated, scored
from analysis.figures import svg_bytes
from analysis.labels import in_order
from analysis.report import status_counts
from analysis.studies.prefix_length import STUDY
from analysis.study import Results, run_study

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
# Mean perplexity over seeds. Compare within a column: models differ more than lengths do.

# %%
rows = calibrated(scored(table))
levels = analysis.summarize(rows)
levels.pivot_table(index="source", columns="model", values="mean", observed=True)

# %% [markdown]
# ## Each model alone
#
# The study averages over models; here each model has its own finding. A best length that few
# resamples choose is luck: read the share beside it.

# %%
for model in in_order(rows["model"]):
    print(STUDY.answer(Results(table[table["model"] == model])).size)

# %% [markdown]
# ## Any two lengths
#
# If you choose two lengths after seeing the figure, p is too small: there were many pairs to choose
# from.

# %%
two, sixteen = (rows[rows["prefix_tokens"] == length] for length in (2, 16))
analysis.compare_selections(two, sixteen)[
    ["model", "pairs", "effect", "low", "high", "unit", "p_holm"]
]

# %% [markdown]
# ## For your own model
#
# Copy the file below and put your model into `models`, or several to compare shapes. Use your own
# corpora for `prefixes` and for `perplexity`. Keep length 2 and two others; the longest must leave
# the model room to write.

# %%
print(STUDY.grid_file.read_text())
