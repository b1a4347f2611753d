"""Turn a generated calibration set of a store into a data set folder that other programs load."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cluster.store import Manifest, Store
from jobs.export import check_unused, fetched, stored_spec, whole_folder
from pipeline.errors import InputError
from pipeline.specs import FilterSpec, PruneSpec

COLUMNS = {
    "sample_id": "number of the sample",
    "source": "of mixed corpora, the name of the one that the prefix is from",
    "text": "the text, without special tokens",
    "input_ids": "its token ids as they were generated, the given ones first",
    "prefix_tokens": "how many leading ids were given and not generated, BOS included",
    "tokens": "how many tokens were scored",
    "perplexity": "perplexity of the scored tokens",
    "min_k": "Min-K% (arXiv 2310.16789)",
    "min_k_plus_plus": "Min-K%++ (arXiv 2404.02936)",
    **{f"loss_{part}": f"mean loss in quarter {part} of the scored tokens" for part in range(1, 5)},
    **{
        f"distinct_{length}": f"different runs of {length} scored tokens, as a share of all"
        for length in range(1, 4)
    },
}
"""The columns of the data set. Tools that find `input_ids` do not tokenise again."""

HEADER = """\
---
license: unknown
tags:
- calibration
- synthetic
configs:
- config_name: default
  data_files: samples.parquet
---
"""
"""What the hub and `datasets` read of a card."""


def export_calibration(store: Store, key: str, folder: Path) -> int:
    """Write the filtered samples with that key, or those that the pruned model with that key was
    calibrated with, to `folder`: `samples.parquet` and a data set card.

    Returns:
        How many samples there are.

    Raises:
        InputError: if the store has no such samples, if they are damaged or of another release, or
            if the folder is in use.
    """
    spec = _filter_spec(store, key)
    check_unused(folder)
    artifacts = fetched(store, key, (spec,))
    manifest = store.manifest(spec.key)
    assert manifest is not None
    samples = pq.read_table(artifacts[spec.key] / "samples.parquet")
    names = ["input_ids" if name == "token_ids" else name for name in samples.column_names]
    samples = samples.rename_columns(names).select(list(COLUMNS)).replace_schema_metadata(None)
    made = store.manifest(spec.scores.samples.key)
    engines = [] if made is None else made.report["engines"]
    with whole_folder(folder) as half_done:
        half_done.mkdir(parents=True)
        pq.write_table(samples, half_done / "samples.parquet")
        (half_done / "README.md").write_text(card(manifest, engines))
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
            "results table's column prune_key names the models",
        )
    calibration = stored_spec(manifest, PruneSpec).calibration
    if calibration is None or not isinstance(calibration.source, FilterSpec):
        remedy = "this model was not calibrated with text that a model wrote; take another"
        raise InputError("key", key, remedy)
    return calibration.source


def card(manifest: Manifest, engines: list[dict[str, Any]]) -> str:
    """The data set card of filtered samples.

    Args:
        engines: engine, version and device that generated.
    """
    report = manifest.report
    columns = "\n".join(f"| `{name}` | {meaning} |" for name, meaning in COLUMNS.items())
    return f"""{HEADER}
# Calibration set {manifest.key}

Texts that a language model wrote from short prefixes of real texts, scored and filtered by
calprune: {report["kept"]} were kept, {report["dropped"]} dropped for their perplexity, \
{report["duplicates"]} as duplicates, {report["near_duplicates"]} as near duplicates, \
{report["banned"]} for a banned word and {report["invalid"]} for want of a score.

The licence is unknown: it depends on the terms of the generating model and of the corpus that the
prefixes come from, both named below.

| column | meaning |
|---|---|
{columns}

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
