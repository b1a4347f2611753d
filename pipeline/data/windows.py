"""Calibration sets: windows of exactly `seqlen` tokens, cut from real or generated text."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.data.corpora import OR_JOIN, Document, documents_for
from pipeline.data.prefixes import parts_in_turn
from pipeline.errors import InputError
from pipeline.models.loading import check_shared_vocabulary, load_configs, load_tokenizer
from pipeline.models.vocabulary import check_ids, edge_ids, embedding_rows
from pipeline.specs import (
    Corpus,
    CorpusMixture,
    FilterSpec,
    GenerateSpec,
    WindowsSpec,
    generator_of,
)
from pipeline.stage import Artifacts

BATCH = 32
"""Texts tokenised at once; at most this many are read in excess."""

JOINED_SURPLUS = 4
"""Times the tokens of all windows, up to which a corpus is joined."""

WINDOWS_SCHEMA = pa.schema(
    {
        "window": pa.int32(),
        "document": pa.string(),
        "offset": pa.int64(),
        "token_ids": pa.list_(pa.int32()),
    }
)


class Tokens(NamedTuple):
    """The ids of one text."""

    document: str
    ids: npt.NDArray[np.int32]


class CalibrationWindow(NamedTuple):
    """`ids` [seqlen], which begin in `document`, `offset` tokens after its first."""

    document: str
    offset: int
    ids: npt.NDArray[np.int32]


class Cutting(NamedTuple):
    """How windows are cut; the first fields are those of `WindowsSpec`."""

    nsamples: int = 128
    seqlen: int = 2048
    packing: Literal["sample", "concat"] = "sample"
    seed: int = 0

    asked_as: str = "nsamples"
    """The field that a user lowers to have fewer windows."""

    @classmethod
    def of(cls, spec: WindowsSpec) -> Self:
        """Return how a spec has windows cut."""
        return cls(spec.nsamples, spec.seqlen, spec.packing, spec.seed)


class CutWindows(NamedTuple):
    """Windows, and how much text was read for them."""

    windows: list[CalibrationWindow]
    texts_read: int
    texts_too_short: int
    tokens_read: int
    distinct_tokens: int
    """Tokens of all windows; one that two windows share counts once."""


def run(spec: WindowsSpec, artifacts: Artifacts, output: Path) -> dict[str, Any]:
    """Cut a calibration set and write `windows.parquet`.

    Raises:
        InputError: if the source has too little text, or if its generator and the model have
            different tokens.
    """
    tokenizer = load_tokenizer(spec.model, artifacts)
    how = Cutting.of(spec)
    match spec.source:
        case GenerateSpec() | FilterSpec():
            generator = generator_of(spec.source)
            check_shared_vocabulary("generator", generator, spec.model, generator, artifacts)
            _, settings = load_configs(generator, artifacts)
            texts = read_samples(artifacts[spec.source.key])
            cut = cut_samples(texts, edge_ids(settings, tokenizer), how)
        case _:
            cut = cut_texts(spec.source, tokenizer, how)
    config, _ = load_configs(spec.model, artifacts)
    for window in cut.windows:
        check_ids(window.ids, embedding_rows(config))
    write_windows(cut.windows, output)
    tokens = spec.nsamples * spec.seqlen
    return {
        "texts_read": cut.texts_read,
        "texts_too_short": cut.texts_too_short,
        "tokens_read": cut.tokens_read,
        "tokens": tokens,
        "distinct_tokens": cut.distinct_tokens,
        "overlap": 1 - cut.distinct_tokens / tokens,
    }


def cut_samples(texts: Iterable[Tokens], edges: list[int], how: Cutting) -> CutWindows:
    """Cut windows from samples; joined ones lose the ids in `edges` at both ends.

    Raises:
        InputError: if the texts are too few or too short.
    """
    if how.packing == "concat":
        return _cut(strip_ends(texts, edges), how)
    return _cut(shuffled(list(texts), how.seed), how)


def cut_texts(source: Corpus | CorpusMixture, tokenizer: Any, how: Cutting) -> CutWindows:
    """Cut windows from real text; the seed draws the order of each corpus's texts.

    From a mixture come the windows that each part alone would give, in turn, and documents name
    their part.

    Raises:
        InputError: if a corpus cannot be read, or has too few texts or too short ones.
    """
    if isinstance(source, CorpusMixture):
        return _cut_mixture(source, tokenizer, how)
    return cut_corpus(source, tokenizer, how)


def cut_corpus(corpus: Corpus, tokenizer: Any, how: Cutting) -> CutWindows:
    """Cut windows from a corpus; the seed draws the order of its texts.

    Raises:
        InputError: if the corpus cannot be read, or has too few texts or too short ones.
    """
    joined = how.packing == "concat"
    rows = documents_for(corpus, how.nsamples, how.seed)
    texts = tokenized(rows, tokenizer, special_tokens=not joined)
    if joined:
        texts = take_tokens(texts, JOINED_SURPLUS * how.nsamples * how.seqlen)
    return _cut(texts, how)


def _cut(texts: Iterable[Tokens], how: Cutting) -> CutWindows:
    if how.packing == "concat":
        return concat_windows(texts, how.nsamples, how.seqlen, how.seed)
    return sample_windows(texts, how.nsamples, how.seqlen, how.seed, how.asked_as)


def _cut_mixture(mixture: CorpusMixture, tokenizer: Any, how: Cutting) -> CutWindows:
    names = parts_in_turn(mixture, how.nsamples)
    cuts = {
        name: cut_corpus(mixture.parts[name].corpus, tokenizer, how._replace(nsamples=count))
        for name, count in Counter(names).items()
    }
    windows = {name: iter(cut.windows) for name, cut in cuts.items()}
    in_turn = [(name, next(windows[name])) for name in names]
    return CutWindows(
        [window._replace(document=f"{name}:{window.document}") for name, window in in_turn],
        texts_read=sum(cut.texts_read for cut in cuts.values()),
        texts_too_short=sum(cut.texts_too_short for cut in cuts.values()),
        tokens_read=sum(cut.tokens_read for cut in cuts.values()),
        distinct_tokens=sum(cut.distinct_tokens for cut in cuts.values()),
    )


def sample_windows(
    texts: Iterable[Tokens], nsamples: int, seqlen: int, seed: int, asked_as: str = "nsamples"
) -> CutWindows:
    """Cut one window from each text that is long enough, until there are `nsamples`.

    The start is uniform over all `len(ids) - seqlen + 1` places. (The reference code of Wanda and
    SparseGPT draws texts with replacement and leaves out the last place.)

    Raises:
        InputError: if too few texts are long enough.
    """
    offsets = np.random.default_rng([seed, 1])
    windows: list[CalibrationWindow] = []
    read = tokens = longest = 0
    for text in texts:
        read += 1
        tokens += len(text.ids)
        longest = max(longest, len(text.ids))
        if len(text.ids) >= seqlen:
            offset = int(offsets.integers(len(text.ids) - seqlen + 1))
            windows.append(
                CalibrationWindow(text.document, offset, text.ids[offset : offset + seqlen])
            )
            if len(windows) == nsamples:
                return CutWindows(windows, read, read - nsamples, tokens, nsamples * seqlen)
    remedy = (
        f"{nsamples} windows of {seqlen} tokens are needed, but of {read} texts only "
        f"{len(windows)} are that long and the longest has {longest} tokens: lower seqlen or "
        f"{asked_as}, give more or longer texts{OR_JOIN if asked_as == 'nsamples' else ''}"
    )
    raise InputError(asked_as, nsamples, remedy)


def concat_windows(texts: Iterable[Tokens], nsamples: int, seqlen: int, seed: int) -> CutWindows:
    """Join all texts and cut `nsamples` windows at uniformly random places; they may overlap.

    Raises:
        InputError: if the texts together are shorter than one window.
    """
    held = list(texts)
    ends = np.cumsum([len(text.ids) for text in held], dtype=np.int64)
    total = int(ends[-1]) if held else 0
    if total < seqlen:
        remedy = (
            f"all {len(held)} texts together have {total} tokens, less than one window: "
            "lower seqlen or give more text"
        )
        raise InputError("seqlen", seqlen, remedy)
    joined = np.concatenate([text.ids for text in held])
    windows = []
    starts = np.random.default_rng([seed, 1]).integers(total - seqlen + 1, size=nsamples)
    for start in starts:
        text = int(np.searchsorted(ends, start, side="right"))
        offset = int(start - ends[text]) + len(held[text].ids)
        windows.append(
            CalibrationWindow(held[text].document, offset, joined[start : start + seqlen])
        )
    distinct = seqlen + int(np.minimum(np.diff(np.sort(starts)), seqlen).sum())
    return CutWindows(windows, len(held), 0, total, distinct)


def tokenized(
    rows: Iterable[Document], tokenizer: Any, *, special_tokens: bool
) -> Iterator[Tokens]:
    """Yield the ids of each whole document in order, reading at most a batch in excess."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, BATCH)):
        texts = [row.text for row in batch]
        encoded = tokenizer(texts, add_special_tokens=special_tokens, verbose=False)
        for row, ids in zip(batch, encoded["input_ids"], strict=True):
            yield Tokens(row.id, np.array(ids, dtype=np.int32))


def read_samples(folder: Path) -> Iterator[Tokens]:
    """Yield the ids of samples, as generated or drawn, in the order of their numbers."""
    table = pq.read_table(folder / "samples.parquet", columns=["sample_id", "token_ids"])
    for row in table.sort_by("sample_id").to_pylist():
        yield Tokens(str(row["sample_id"]), np.array(row["token_ids"], dtype=np.int32))


def shuffled(texts: list[Tokens], seed: int) -> Iterator[Tokens]:
    """Return the texts in a random order."""
    return (texts[place] for place in np.random.default_rng([seed, 0]).permutation(len(texts)))


def take_tokens(texts: Iterable[Tokens], tokens: int) -> Iterator[Tokens]:
    """Yield the first texts, up to the one with which they have at least `tokens` tokens."""
    taken = 0
    for text in texts:
        yield text
        taken += len(text.ids)
        if taken >= tokens:
            return


def strip_ends(texts: Iterable[Tokens], ends: list[int]) -> Iterator[Tokens]:
    """Yield the texts without the ids in `ends` at their beginning and end."""
    for document, ids in texts:
        inside = np.flatnonzero(~np.isin(ids, ends))
        yield Tokens(document, ids[inside[0] : inside[-1] + 1] if len(inside) else ids[:0])


def write_windows(windows: list[CalibrationWindow], folder: Path) -> None:
    """Write `windows.parquet`."""
    columns = {
        "window": range(len(windows)),
        "document": [window.document for window in windows],
        "offset": [window.offset for window in windows],
        "token_ids": [window.ids for window in windows],
    }
    pq.write_table(pa.table(columns, schema=WINDOWS_SCHEMA), folder / "windows.parquet")


def read_windows(folder: Path) -> torch.Tensor:
    """Return the ids of `windows.parquet`, [nsamples, seqlen] int64."""
    column = pq.read_table(folder / "windows.parquet", columns=["token_ids"])["token_ids"]
    ids = column.combine_chunks().flatten().to_numpy().astype(np.int64)
    return torch.from_numpy(ids).reshape(len(column), -1)
