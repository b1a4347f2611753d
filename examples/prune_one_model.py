"""Prune one model in a notebook, without a grid, a store or Ray.

`python -m jobs prepare` makes this model and these texts; any checkpoint and texts will do.
"""

# %%
import pipeline

TEXT = ".calprune-real/text/wikipedia"

# %%
model = pipeline.load(".calprune-real/model")
windows = pipeline.windows(model, f"{TEXT}-train.jsonl", nsamples=16, seqlen=128)
pipeline.prune(model, windows, "wanda", sparsity=0.5)
found = pipeline.evaluate(model, {"held out": f"{TEXT}-heldout.jsonl"}, seqlen=128, max_windows=8)
print({row.metric: round(row.value, 3) for row in found})
