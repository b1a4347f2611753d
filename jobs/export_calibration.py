"""Export filtered samples from a store as a data set folder that other programs load."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cluster.store import Manifest, Store
from jobs.export import check_unused, fetched, stored_spec, whole_folder
from pipeline.errors import InputError
from pipeline.specs import DrawSpec, FilterSpec, PruneSpec

SAMPLE_COLUMNS = {
    "sample_id": "number of the sample",
    "source": "name of the corpus of the text or prefix, if corpora were mixed",
    "text": "text without special tokens",
    "input_ids": "token ids as generated, the prefix first, or as cut from the text",
    "prefix_tokens": "number of leading ids that were given, BOS included",
    "tokens": "number of scored tokens",
    "perplexity": "perplexity of the scored tokens",
    "min_k": "Min-K% (arXiv 2310.16789)",
    "min_k_plus_plus": "Min-K%++ (arXiv 2404.02936)",
    **{f"loss_{part}": f"mean loss in quarter {part} of the scored tokens" for part in range(1, 5)},
    **{
        f"distinct_{length}": f"distinct {length}-grams of the scored tokens, as a share of all"
        for length in range(1, 4)
    },
}
"""Columns of the data set and their meaning. Tools that find `input_ids` do not tokenize again."""

HEADER = """\
---
license: unknown
tags:
- calibration{tags}
configs:
- config_name: default
  data_files: samples.parquet
---
"""
"""The part of the card that the hub and `datasets` read."""

SYNTHETIC = "\n- synthetic"
"""A tag of text that a model wrote."""

WRITTEN = (
    "Texts that a language model wrote from short prefixes of real texts",
    "The licence is unknown: it depends on the terms of the generating model and of the corpus of "
    "the prefixes, both named below.",
)
DRAWN = (
    "Stretches of real texts",
    "The licence is unknown: it depends on the terms of the corpus, which is named below.",
)
"""What the samples are, and whose terms hold for them."""


def export_calibration(store: Store, key: str, folder: Path) -> int:
    """Write filtered samples to `folder` as `samples.parquet` with a data set card.

    Args:
        key: of the filtered samples, or of a pruned model that was calibrated with them.

    Returns:
        The number of samples.

    Raises:
        InputError: if the store has no such samples, if they are damaged or from another release,
            or if the folder is not empty.
    """
    spec = _filter_spec(store, key)
    check_unused(folder)
    artifacts = fetched(store, key, (spec,))
    manifest = store.manifest(spec.key)
    assert manifest is not None
    samples = pq.read_table(artifacts[spec.key] / "samples.parquet")
    names = ["input_ids" if name == "token_ids" else name for name in samples.column_names]
    columns = [name for name in SAMPLE_COLUMNS if name in names]
    samples = samples.rename_columns(names).select(columns).replace_schema_metadata(None)
    generation = store.manifest(spec.scores.samples.key)
    engines = [] if generation is None else generation.report.get("engines", [])
    with whole_folder(folder) as partial:
        partial.mkdir(parents=True)
        pq.write_table(samples, partial / "samples.parquet")
        (partial / "README.md").write_text(card(manifest, spec, engines, columns))
    return len(samples)


def _filter_spec(store: Store, key: str) -> FilterSpec:
    manifest = store.manifest(key)
    if manifest is not None and manifest.kind == "filter":
        return stored_spec(manifest, FilterSpec)
    if manifest is None or manifest.kind != "prune":
        raise InputError(
            "key",
            key,
            f"{store.url} has neither filtered samples nor a pruned model with this key; the "
            "results table's column prune_key lists the models",
        )
    calibration = stored_spec(manifest, PruneSpec).calibration
    if calibration is None or not isinstance(calibration.source, FilterSpec):
        remedy = "was not calibrated with filtered samples; choose another model"
        raise InputError("key", key, remedy)
    return calibration.source


def card(
    manifest: Manifest, spec: FilterSpec, engines: list[dict[str, Any]], columns: Sequence[str]
) -> str:
    """Return the data set card of filtered samples.

    Args:
        engines: engine, version and device of each generation.
        columns: names of the data set's columns.
    """
    drawn = isinstance(spec.scores.samples, DrawSpec)
    what, terms = DRAWN if drawn else WRITTEN
    report = manifest.report
    meanings = "\n".join(f"| `{name}` | {SAMPLE_COLUMNS[name]} |" for name in columns)
    return f"""{HEADER.format(tags="" if drawn else SYNTHETIC)}
# Calibration set {manifest.key}

{what}, filtered by calprune: \
{report["kept"]} were kept, {report["dropped"]} dropped by {spec.drop_by}, \
{report["duplicates"]} as duplicates, {report["near_duplicates"]} as near duplicates, \
{report["banned"]} for a banned word and {report["invalid"]} because there was no token to score.

{terms}

| column | meaning |
|---|---|
{meanings}

## Engines

```json
{json.dumps(engines, indent=1, sort_keys=True)}
```

## Versions

```json
{json.dumps(manifest.versions, indent=1, sort_keys=True)}
```

## Lineage

```json
{json.dumps(manifest.spec, indent=1, sort_keys=True, ensure_ascii=False)}
```
"""
