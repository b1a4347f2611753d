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
# # How much of the generated text should be dropped, and for which pruner?
#
# Main contrast: dropping 20 % against dropping nothing. Samples of high perplexity may be broken
# text, or rare text that the pruned model should keep.
#
# Results: `python -m jobs run analysis/studies/filter.yaml --store STORE`. Set the store here or in
# the environment; `docs/studies.md` explains how a finding is made.

# %%
import os

from IPython.display import SVG

import analysis
from analysis.evidence import calibrated, scored
from analysis.figures import svg_bytes
from analysis.labels import in_order
from analysis.report import status_counts
from analysis.statistics import best_calibration
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
SVG(svg_bytes(answer.figure))

# %%
answer.numbers.round(3)

# %% [markdown]
# ## Means over seeds
#
# Mean perplexity over seeds, by the share dropped.

# %%
rows = calibrated(scored(table))
levels = analysis.summarize(rows)
levels.pivot_table(index="source", columns="method", values="mean", observed=True)

# %% [markdown]
# ## The best rate of each pruner
#
# The rate with the best mean, against no filter. There is no effect where no filter is the best.
# The best of several is also the luckiest: `p_holm` is corrected for all rates, the interval is
# not.

# %%
unfiltered = rows[rows["drop_fraction"] == 0]
task, metric = rows[["task", "metric"]].iloc[0]
best = best_calibration(rows, task, metric, in_order(unfiltered["source"])[0])
best[["model", "method", "target", "source", "mean", "effect", "low", "high", "unit", "p_holm"]]

# %% [markdown]
# ## For your own model
#
# Copy the file below and put your model into `models` and your corpora into `corpora`. Keep the
# rates 0 and 0.2. Try a higher `temperature` in the calibration: hotter text gives the filter more
# to drop. `describe` scores the set that is left at each rate; the study reports these scores if
# they are there.

# %%
print(STUDY.grid_file.read_text())
