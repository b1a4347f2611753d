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
# # Does calibration data of several sources keep a model's capabilities better than one source?
#
# Main contrast: mixed data against all single sources, over all capabilities. A single source may
# keep its own capability and lose the others.
#
# Results: `python -m jobs run analysis/studies/mixing.yaml --store STORE`. Set the store here or in
# the environment; `docs/studies.md` explains how a finding is made.

# %%
import os

from IPython.display import SVG

import analysis
from analysis.figures import svg_bytes
from analysis.labels import in_order
from analysis.report import status_counts
from analysis.studies.mixing import STUDY
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
# Mean perplexity over seeds and pruners, in percent above the best source of each capability. A
# row's highest number is its calibration's worst result. The row whose worst result is best is the
# safe choice.

# %%
levels = analysis.summarize(table[(table["metric"] == "perplexity") & table["seed"].notna()])
means = levels.pivot_table(index="source", columns="task", values="mean", observed=True)
above = 100 * (means / means.min() - 1)
above.assign(worst=above.max(axis=1)).sort_values("worst").round(1)

# %% [markdown]
# ## Without one capability
#
# Does the finding rest on a capability that only its own source can keep? Each capability is left
# out in turn.

# %%
for measure in in_order(table.loc[table["metric"] == "perplexity", "task"]):
    without = STUDY.answer(Results(table[table["task"] != measure]))
    print(f"without {measure}:", without.what, without.size)

# %% [markdown]
# ## In accuracy
#
# Perplexity changes long before answers do. The table shows the share of right answers, averaged
# over seeds and pruners; the mean over tasks is one more task. It is empty if the grid evaluated no
# tasks.

# %%
rows = analysis.with_mean_accuracy(table)
rows = rows[(rows["metric"] == "acc") & rows["seed"].notna()]
analysis.summarize(rows).pivot_table(index="source", columns="task", values="mean", observed=True)

# %% [markdown]
# ## For your own model
#
# Copy the file below, put your model into `models`, and give each capability a corpus and a
# held-out text. A calibration is named like its measure without `-heldout`; the mixture is called
# `mixed`. Give the mixture the shares of your use case, and add tasks by their lm-eval names.

# %%
print(STUDY.grid_file.read_text())
