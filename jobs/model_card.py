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
    Quantizer,
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


def model_card(
    manifest: Manifest, spec: PruneSpec, measured: Sequence[BeforeAfter], *, packed: bool = False
) -> str:
    """Return the card of a pruned model.

    Args:
        manifest: of the pruned model.
        measured: numbers of the pruned and of the dense model; may be empty.
        packed: whether its weights are stored as integers.
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
# {_name(dense)}, {_made(spec)} by {spec.pruner.name}{_fitted(spec)}

Of the matrices of its decoder layers {manifest.report["sparsity"]:.2%} of the weights are zero, \
counted in what was stored. {_rounded(spec)}{_calibration(spec)} {_stored(spec, packed)} \
The licence is that of the dense model.

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


def _made(spec: PruneSpec) -> str:
    """Return what was done, in words: `pruned to 2:4`, `rounded to 4 bits and pruned to 50 %`."""
    pruned = f"pruned to {spec.pattern or f'{100 * spec.sparsity:g} %'}"
    if not isinstance(spec.pruner, Quantizer):
        return pruned
    rounded = f"rounded to {spec.pruner.bits} bits"
    return f"{rounded} and {pruned}" if spec.sparsity else rounded


def _fitted(spec: PruneSpec) -> str:
    return "" if spec.reconstruction is None else ", kept weights fitted"


def _rounded(spec: PruneSpec) -> str:
    if not isinstance(spec.pruner, Quantizer):
        return ""
    numbers, inputs = 2**spec.pruner.bits, spec.pruner.group_size
    if spec.pruner.few_values:
        return (
            f"In each row the weights of {inputs} adjacent inputs have at most {numbers} values. "
        )
    return (
        f"In each row the weights of {inputs} adjacent inputs were rounded to at most {numbers} "
        "values while each input was scaled, and then scaled back. "
    )


def _stored(spec: PruneSpec, packed: bool) -> str:
    if packed:
        return (
            "The weights are stored as integers and scales in the format pack-quantized of "
            "compressed-tensors, which vLLM reads, and transformers with compressed-tensors."
        )
    used = "few bits" if isinstance(spec.pruner, Quantizer) else "zeros"
    return (
        "The weights are stored like any others: the files are as large as the dense model's, and "
        f"only a program that makes use of {used} is quicker."
    )


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
    used = f"{windows.nsamples} windows of {windows.seqlen} tokens"
    chosen = f"Calibrated with {used} {_from(windows)}."
    if spec.reconstruction is None:
        return chosen
    other = spec.reconstruction.calibration
    data = "the same windows" if other is None else f"{other.nsamples} windows {_from(other)}"
    return f"{chosen} Each layer's kept weights were then fitted to its dense outputs on {data}."


def _from(windows: WindowsSpec) -> str:
    if not isinstance(windows.source, FilterSpec):
        return "of real text"
    samples = windows.source.scores.samples
    return "of real text" if isinstance(samples, DrawSpec) else "that a model wrote"
