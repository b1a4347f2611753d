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
# Main contrast: calibration in a language against calibration in the other, for that language's
# text. Calibration in one language may harm the other.
#
# Results: `python -m jobs run analysis/studies/language.yaml --store STORE`. Set the store here or
# in the environment; `docs/studies.md` explains how a finding is made.

# %%
import os

from IPython.display import SVG

import analysis
from analysis.figures import svg_bytes
from analysis.report import status_counts
from analysis.studies.language import STUDY, languages
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
# Mean perplexity over seeds and pruners: one row per calibration, one column per measured language.
# Compare within a column, since the languages are not equally hard.

# %%
perplexities = table[table["metric"] == "perplexity"]
levels = analysis.summarize(perplexities)
levels.pivot_table(index="source", columns="task", values="mean", observed=True)

# %% [markdown]
# ## Who pays?
#
# The study averages over both languages. This table compares calibration in the first language with
# calibration in the second, for each measure: what one language gains, the other may lose.

# %%
first, second = languages(table)
columns = ["method", "task", "pairs", "effect", "low", "high", "unit", "p_holm"]
in_first, in_second = (
    perplexities[perplexities["calibration"] == name] for name in (first, second)
)
analysis.compare_selections(in_first, in_second)[columns]

# %% [markdown]
# ## For your own model
#
# Copy the file below, put your model into `models`, and give each language a corpus and held-out
# text. The study finds them by name: the calibration is named after its language, the measure adds
# `-heldout`, generated data has the prefix `self-generated-`, and the mixture is called `both`. Try
# shares other than one half in the mixture.

# %%
print(STUDY.grid_file.read_text())
