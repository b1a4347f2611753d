"""A pool of real text for a filter to choose from: samples of `seqlen` tokens."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.data.prefixes import parts_in_turn
from pipeline.data.samples import Sample, samples_table, text_of
from pipeline.data.windows import Cutting, CutWindows, cut_texts
from pipeline.models.loading import load_configs, load_tokenizer
from pipeline.models.vocabulary import check_ids, embedding_rows
from pipeline.specs import CorpusMixture, DrawSpec
from pipeline.stage import Artifacts


def run(spec: DrawSpec, artifacts: Artifacts, output: Path) -> dict[str, Any]:
    """Draw a pool and write `samples.parquet`.

    Raises:
        InputError: if the source has too few texts of `seqlen` tokens, or the tokenizer and the
            model do not fit.
    """
    tokenizer = load_tokenizer(spec.model, artifacts)
    config, _ = load_configs(spec.model, artifacts)
    cut = cut_pool(spec, tokenizer, embedding_rows(config), "pool")
    samples = as_samples(cut, tokenizer)
    pq.write_table(samples_table(samples, sources(spec)), output / "samples.parquet")
    return {
        "samples": len(samples),
        "texts_read": cut.texts_read,
        "texts_too_short": cut.texts_too_short,
        "tokens_read": cut.tokens_read,
    }


def cut_pool(spec: DrawSpec, tokenizer: Any, rows: int, asked_as: str) -> CutWindows:
    """Cut a stretch of each text.

    Args:
        rows: rows of the model's embeddings.
        asked_as: see `Cutting`.

    Raises:
        InputError: if the source has too few texts of `seqlen` tokens, or the embeddings lack an
            id.
    """
    how = Cutting(spec.num_samples, spec.seqlen, "sample", spec.seed, asked_as)
    cut = cut_texts(spec.source, tokenizer, how)
    for window in cut.windows:
        check_ids(window.ids, rows)
    return cut


def as_samples(cut: CutWindows, tokenizer: Any) -> list[Sample]:
    """Return windows as samples, numbered in their order."""
    rows = [window.ids.tolist() for window in cut.windows]
    return [Sample(number, 0, ids, text_of(ids, tokenizer)) for number, ids in enumerate(rows)]


def sources(spec: DrawSpec) -> list[str | None]:
    """Return the name of each sample's corpus; None if there is but one."""
    if not isinstance(spec.source, CorpusMixture):
        return [None] * spec.num_samples
    return list(parts_in_turn(spec.source, spec.num_samples))
