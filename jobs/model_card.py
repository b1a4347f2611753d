"""The card of an exported model: what it is, what it lost, how it was made."""

import json
from collections.abc import Sequence

from cluster.store import Manifest
from jobs.before_after import BeforeAfter, cells_of, losses
from pipeline.specs import (
    DrawSpec,
    FilterSpec,
    HubModel,
    LocalModel,
    Model,
    PruneSpec,
    WindowsSpec,
    dense_model,
)

HEADER = """\
---
license: other
license_name: that-of-the-dense-model{base}
library_name: transformers
pipeline_tag: text-generation
tags:
- pruned
- calprune
---
"""
"""The part of the card that the hub reads."""

NOT_MEASURED = (
    "Whatever is not in the table was not measured: other kinds of text and languages, code, "
    "dialogue, instructions, refusals, longer texts. Pruning harms most what the calibration data "
    "lack. Measure what you need before you use the model."
)


def model_card(manifest: Manifest, spec: PruneSpec, measured: Sequence[BeforeAfter]) -> str:
    """Return the card of a pruned model.

    Args:
        manifest: of the pruned model.
        measured: numbers of the pruned and of the dense model; may be empty.
    """
    dense = dense_model(spec)
    base = f"\nbase_model: {dense.name}" if isinstance(dense, HubModel) else ""
    rows = "\n".join(f"| {' | '.join(cells_of(each))} |" for each in measured)
    table = (
        "| measured on | metric | dense | pruned | times |\n|---|---|---|---|---|\n"
        f"{rows}\n\n"
        "± is the standard error of the pruned model's number, over windows or questions."
        if measured
        else "Nothing was measured of this model."
    )
    lost = "".join(f"- {sentence}.\n" for sentence in losses(measured))
    return f"""{HEADER.format(base=base)}
# {_name(dense)}, pruned to {target_name(spec)} by {spec.pruner.name}

Of the pruned matrices {manifest.report["sparsity"]:.2%} of the weights are zero, counted in \
what was stored. {_calibration(spec)} Zeros are stored like other weights: the files are as large \
as the dense model's, and only a program that makes use of zeros is quicker. The licence is that \
of the dense model.

## Before and after

{table}

## What it is not good for any more

{lost}
{NOT_MEASURED}

## Versions

```json
{json.dumps(manifest.versions, indent=1, sort_keys=True)}
```

## Lineage

calprune made this model, `{manifest.key}`, from this:

```json
{json.dumps(manifest.spec, indent=1, sort_keys=True, ensure_ascii=False)}
```
"""


def target_name(spec: PruneSpec) -> str:
    """Return the target in words: `50 %` or `2:4`."""
    return spec.pattern or f"{100 * spec.sparsity:g} %"


def _name(dense: Model) -> str:
    match dense:
        case HubModel():
            return f"{dense.name} (revision {dense.revision})"
        case LocalModel():
            return dense.path
        case _:
            return "A testbed model"


def _calibration(spec: PruneSpec) -> str:
    windows = spec.calibration
    if windows is None:
        return "No data were used."
    return (
        f"Calibrated with {windows.nsamples} windows of {windows.seqlen} tokens {_from(windows)}."
    )


def _from(windows: WindowsSpec) -> str:
    if not isinstance(windows.source, FilterSpec):
        return "of real text"
    samples = windows.source.scores.samples
    return "of real text" if isinstance(samples, DrawSpec) else "that a model wrote"
