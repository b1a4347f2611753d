"""From a model to an answer and a pruned checkpoint, in a notebook.

`python -m jobs prepare` makes this model and these texts; any checkpoint and texts will do. Jupyter
opens this file through jupytext. With ipywidgets the run shows its progress below the cell, and
without it in the log.
"""

# %%
import logging

import analysis
from jobs import library as calprune
from jobs.one_model import OneModel
from pipeline.specs import FileCorpus, LocalModel

logging.basicConfig(level=logging.INFO)

STORE = ".calprune"  # or s3://bucket/store
TEXT = ".calprune-real/text"

# %% A grid: two calibrations, one pruner, two draws of data.
grid = calprune.read(
    {
        "name": "first",
        "models": {"smollm2": LocalModel(path=".calprune-real/model", dtype="float32")},
        "corpora": {
            "wikipedia": FileCorpus(path=f"{TEXT}/wikipedia-train.jsonl"),
            "python": FileCorpus(path=f"{TEXT}/python-train.jsonl"),
            "heldout": FileCorpus(path=f"{TEXT}/wikipedia-heldout.jsonl"),
        },
        "calibrations": {name: {"corpus": name} for name in ("wikipedia", "python")},
        "cells": {
            "model": "smollm2",
            "calibration": ["wikipedia", "python"],
            "pruner": "wanda",
            "sparsity": 0.5,
            "seed": [0, 1],
            "nsamples": 8,
            "seqlen": 64,
        },
        "evaluate": {
            "perplexity": [{"corpus": "heldout", "seqlen": 64, "max_windows": 32, "kl": True}]
        },
    }
)

# %% Run it, or continue it. `address="auto"` joins a running Ray cluster.
calprune.run(grid, STORE)

# %% A row for each cell, a column for each number.
table = analysis.load_results(STORE, grid="first")
wide = analysis.wide(table)
print(wide[["method", "source", "seed", "heldout: perplexity", "heldout: kl"]].to_string())

# %% The best cell, and how sure that is.
print(calprune.best(grid, STORE, sparsity="0.5", folder="best").reason)

# %% Or prune one model, without a grid.
asked = OneModel(
    ".calprune-real/model",
    sparsity="2:4",
    prefixes=(f"{TEXT}/wikipedia-train.jsonl",),
    probe=(f"{TEXT}/python-heldout.jsonl",),
    nsamples=8,
    seqlen=64,
)
key, measured = calprune.prune(asked, "pruned", STORE)
for each in measured:
    print(each.task, each.metric, each.dense, each.pruned)
