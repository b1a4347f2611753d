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
# # From which sparsity on does self-generated calibration data matter?
#
# Main contrast: self-generated data against the mismatched corpus at each target. At low sparsity
# any text will do; the study finds where that ends.
#
# Results: `python -m jobs run analysis/studies/sparsity.yaml --store STORE`. Set the store here or
# in the environment; `docs/studies.md` explains how a finding is made.

# %%
import os

from IPython.display import SVG

import analysis
from analysis.evidence import calibrated, scored
from analysis.figures import svg_bytes
from analysis.labels import in_order
from analysis.report import status_counts
from analysis.studies.sparsity import STUDY
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
# Mean perplexity over seeds. A large effect can still be the better of two broken models: compare
# with the dense one, if the grid has it.

# %%
rows = scored(table)
levels = analysis.summarize(rows)
levels.pivot_table(index=["method", "target"], columns="source", values="mean", observed=True)

# %% [markdown]
# ## How firm is the threshold?
#
# The threshold is where an effect is first shown, so it depends on the pruner and on the number of
# seeds. If half of the seeds move it up, more seeds may move it down.

# %%
for pruner in in_order(calibrated(rows)["pruner"]):
    print(f"{pruner}:", STUDY.answer(Results(table[table["pruner"] == pruner])).what)
print(
    "half of the seeds:", STUDY.answer(Results(table[table["seed"] < table["seed"].median()])).what
)

# %% [markdown]
# ## What is left to gain
#
# Self-generated data against the true pretraining text, which only the testbed knows. Where the
# effect is near 0, self-generated data replaces the pretraining text fully.

# %%
generated = rows[rows["calibration"] == "self-generated"]
true = rows[rows["calibration"] == "pretraining"]
analysis.compare_selections(generated, true)[
    ["method", "target", "pairs", "effect", "low", "high", "unit", "p_holm"]
]

# %% [markdown]
# ## For your own model
#
# Copy the file below and put your model into `models`, a corpus for calibration into `mismatched`,
# and held-out text of the model's use case into `heldout`. Drop the calibration `pretraining`
# unless you have the pretraining text. To save time, keep only the sparsities near the threshold
# and use more seeds.

# %%
print(STUDY.grid_file.read_text())
