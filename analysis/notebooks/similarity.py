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
# # Does calibration data prune better, the nearer it is to the pretraining data?
#
# Main contrast: the trend over the share of text of unseen kinds. The paper rests on this claim:
# self-generated data is meant to be near the pretraining data.
#
# Results: `python -m jobs run analysis/studies/similarity.yaml --store STORE`. Set the store here
# or in the environment; `docs/studies.md` explains how a finding is made.

# %%
import os

from IPython.display import SVG

import analysis
from analysis.evidence import calibrated, estimate_rows, scored, slope, trailing_number
from analysis.figures import svg_bytes
from analysis.report import status_counts
from analysis.studies.similarity import STUDY
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
# Mean perplexity over seeds, from the pretraining mixture to text of unseen kinds only.

# %%
rows = calibrated(scored(table))
levels = analysis.summarize(rows)
levels.pivot_table(index="source", columns=["method", "target"], values="mean", observed=True)

# %% [markdown]
# ## Each pruner and sparsity alone
#
# Does the trend hold in each setting, or does one carry it? The trend is in percent of perplexity
# per 10 points of unseen text.

# %%
rows = rows.assign(share=[trailing_number(name) for name in rows["calibration"]])
trends = {
    f"{method}, {target}": slope(part, "share", ["calibration"], per=10)
    for (method, target), part in rows.groupby(["method", "target"], observed=True)
}
estimate_rows(trends).round(3)

# %% [markdown]
# ## For your own model
#
# The testbed's pretraining text is known, so nearness can be set. For your own model it can only be
# guessed: mix a corpus that you believe was in its training with one whose kind or date excludes
# it, name the calibrations `unseen-SHARE` with the share in percent, and keep 0 and two others. The
# predictor study asks which score measures nearness where no share is known.

# %%
print(STUDY.grid_file.read_text())
