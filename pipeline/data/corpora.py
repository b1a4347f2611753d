"""Corpora: their documents in their own or a seeded order, and checks before any work."""

import glob
import itertools
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError, cut
from pipeline.files import files, readable, reason, relative
from pipeline.hub import copy_of, corpus_item, hub_answers, local_files, named_files, on_hub
from pipeline.specs import Corpus, FileCorpus, HubCorpus, TestbedCorpus
from pipeline.text import check_characters, lines

SHUFFLE_BUFFER = 10_000
"""Documents that a streamed hub corpus holds to draw the next one from."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
FORMATS = (".jsonl", ".json", ".parquet", ".txt")

OR_JOIN = ", or set packing: concat"
"""A remedy for too few long texts, where texts can be joined."""

TESTBED_TEXTS = 1000
"""Texts of the endless testbed that are tried for each that is needed."""


class Document(NamedTuple):
    """A text; `id` is its place in its corpus."""

    id: str
    text: str


def read_documents(
    corpus: Corpus, seed: int | None = None, *, blank: bool = False
) -> Iterator[Document]:
    """Yield each document of a corpus at most once.

    The seed draws the order: of all rows of a file corpus, whose texts are then held in memory, or
    of a downloaded hub corpus. A streamed hub corpus shuffles its shards and a buffer of 10,000
    documents, whose ids are then places in the shuffled stream.

    Args:
        seed: None keeps the corpus's own order.
        blank: also yield blank texts.

    Raises:
        InputError: if the corpus cannot be read as described, or all its texts are blank.
    """
    match corpus:
        case FileCorpus():
            rows = _file_documents(corpus, seed)
        case HubCorpus():
            rows = _hub_documents(corpus, seed)
        case TestbedCorpus():
            rows = _testbed_documents(corpus, seed)
    kept = (document for document in rows if blank or document.text.strip())
    first = next(kept, None)
    if first is None:
        raise InputError("corpus", _source(corpus), "holds no text: every document is blank")
    yield first
    yield from kept


def documents_for(corpus: Corpus, count: int, seed: int | None) -> Iterator[Document]:
    """Yield the documents in which `count` suitable texts are looked for.

    They are all of the corpus, in the order of the seed, but of the endless testbed only
    `TESTBED_TEXTS` for each text needed.

    Raises:
        InputError: if the corpus cannot be read as described, or all its texts are blank.
    """
    rows = read_documents(corpus, seed)
    endless = isinstance(corpus, TestbedCorpus)
    return itertools.islice(rows, TESTBED_TEXTS * count) if endless else rows


def check_corpus(
    corpus: Corpus,
    nsamples: int = 1,
    seqlen: int = 1,
    *,
    joined: bool = False,
    asked_as: str = "nsamples",
) -> str | None:
    """Check cheaply that a corpus can have `nsamples` texts of `seqlen` tokens each.

    No tokenizer is needed: a text of b UTF-8 bytes has at most b + 2 tokens, special ones included.
    What is refused would certainly fail; what passes may still be too short.

    Args:
        joined: require only `seqlen` tokens in all texts together.
        asked_as: the field that a user lowers to need fewer texts; those of a `pool` are not
            joined.

    Returns:
        A warning if the corpus was not checked because its hub is out of reach, or if windows will
        overlap because all texts together have too few tokens.

    Raises:
        InputError: if the corpus cannot be read, or is certainly too short.
    """
    if isinstance(corpus, HubCorpus):
        note = _check_hub(corpus)
        if not local_files(corpus):
            return note
        # Stream it, since it is not prepared yet; parts of a split cannot be streamed.
        corpus = corpus.model_copy(update={"streaming": "[" not in corpus.split})
    rows = documents_for(corpus, 1, None)
    tokens = np.array([len(row.text.encode()) + 2 for row in rows])
    source = _source(corpus)
    if joined:
        if tokens.sum() < seqlen and not isinstance(corpus, TestbedCorpus):
            remedy = f"holds at most {tokens.sum()} tokens, {seqlen} are needed: lower seqlen"
            raise InputError("corpus", source, remedy)
        if tokens.sum() < nsamples * seqlen and not isinstance(corpus, TestbedCorpus):
            return (
                f"{nsamples} windows of {seqlen} tokens will overlap: all texts have at most "
                f"{tokens.sum()} tokens, not {nsamples * seqlen}; lower nsamples or give more text"
            )
        return None
    enough = int((tokens >= seqlen).sum())
    if enough == 0 or (enough < nsamples and not isinstance(corpus, TestbedCorpus)):
        remedy = (
            f"{nsamples} texts of at least {seqlen} tokens are needed; of {len(tokens)} texts "
            f"{enough} can be that long, and the longest has at most {tokens.max()} tokens: "
            f"lower seqlen or {asked_as}{OR_JOIN if asked_as == 'nsamples' else ''}"
        )
        raise InputError("corpus", source, remedy)
    return None


def _source(corpus: Corpus) -> str:
    if isinstance(corpus, TestbedCorpus):
        return f"testbed {dict(corpus.mixture)}"
    return corpus.path


# ------------------------------------------------------------------------------------------ files


def _file_documents(corpus: FileCorpus, seed: int | None) -> Iterator[Document]:
    filesystem, names = files(corpus.path)
    for name in names:
        _format(name)
    rows = (
        Document(f"{shown}:{row}", text)
        for name, shown in zip(names, relative(names), strict=True)
        for row, text in enumerate(_texts(filesystem, name, corpus))
    )
    if seed is None:
        yield from rows
    else:
        held = list(rows)
        for row in np.random.default_rng(seed).permutation(len(held)):
            yield held[row]


def _format(name: str) -> tuple[str, str | None]:
    """Return the format, such as `.jsonl`, and the compression or None."""
    path = PurePosixPath(name.lower())
    compression = COMPRESSIONS.get(path.suffix)
    ending = path.with_suffix("").suffix if compression else path.suffix
    if ending not in FORMATS or (compression and ending == ".parquet"):
        known = ", ".join(FORMATS)
        packed = ", ".join(COMPRESSIONS)
        raise InputError("path", name, f"unknown ending: {known}, the text ones also with {packed}")
    return ending, compression


def _texts(filesystem: Any, name: str, corpus: FileCorpus) -> Iterator[str]:
    ending, compression = _format(name)
    with readable("path", corpus.path), filesystem.open(name, "rb") as stream:
        if ending == ".parquet":
            yield from _parquet_texts(stream, name, corpus.text_field)
            return
        opened = pa.CompressedInputStream(stream, compression) if compression else stream
        try:
            for number, line in enumerate(lines(opened, name), start=1):
                if ending == ".txt":
                    yield line
                else:
                    yield _json_text(line, f"{name}, line {number}", corpus.text_field)
        except OSError as error:
            if compression is None or error.errno is not None:
                raise
            remedy = f"is no whole {compression} file ({reason(error)}): fetch or pack it again"
            raise InputError("path", name, remedy) from error


def _json_text(line: str, place: str, text_field: str) -> str:
    if not line.strip():
        return ""
    try:
        row = json.loads(line, object_pairs_hook=tuple)  # pairs, since a name may occur twice
    except (ValueError, RecursionError) as error:
        remedy = f"is no JSON ({error}): write one JSON object a line"
        raise InputError("path", place, remedy) from error
    if not isinstance(row, tuple):
        raise InputError("path", place, "is no JSON object: write one JSON object a line")
    texts = [value for name, value in row if name == text_field]
    if not texts:
        has = sorted(name for name, _ in row)
        raise InputError("text_field", text_field, f"{place} has only {has}")
    if len(texts) > 1:
        raise InputError("text_field", text_field, f"{place} has it {len(texts)} times: keep one")
    return _checked_text(texts[0], text_field, place)


def _checked_text(text: Any, text_field: str, place: str) -> str:
    if not isinstance(text, str | None):
        shown = "an object" if isinstance(text, tuple | dict) else cut(repr(text), 60)
        raise InputError("text_field", text_field, f"{place} holds {shown} there, not text")
    check_characters(text or "", "path", place)
    return text or ""


def _parquet_texts(stream: Any, name: str, text_field: str) -> Iterator[str]:
    row = 0
    try:
        table = pq.ParquetFile(stream)
        schema = table.schema_arrow
        if text_field not in schema.names:
            raise InputError("text_field", text_field, f"{name} has only {sorted(schema.names)}")
        kind = schema.field(text_field).type
        if not _is_text(kind):
            raise InputError("text_field", text_field, f"{name} holds {kind} there, not text")
        for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
            for text in batch.column(0):
                yield text.as_py() or ""
                row += 1
    except UnicodeDecodeError as error:
        remedy = f"is not UTF-8 ({error}): write the column again"
        raise InputError("path", f"{name}, row {row}", remedy) from error
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        remedy = f"is no Parquet file, or a damaged one ({reason(error)}): fetch it again"
        raise InputError("path", name, remedy) from error


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in tests)


# -------------------------------------------------------------------------------- hub and testbed


def _hub_documents(corpus: HubCorpus, seed: int | None) -> Iterator[Document]:
    import datasets

    number = -1
    try:
        rows = datasets.load_dataset(
            **_hub_source(corpus), split=corpus.split, streaming=corpus.streaming
        )
        for number, row in _numbered(rows, seed, corpus.streaming):
            if corpus.text_field not in row:
                remedy = f"{corpus.path} has only {sorted(row)}"
                raise InputError("text_field", corpus.text_field, remedy)
            place = f"{corpus.path}, row {number}"
            text = _checked_text(row[corpus.text_field], corpus.text_field, place)
            # The builder `text` leaves a file's byte order mark in its first line.
            yield Document(str(number), text.removeprefix("\ufeff" * (corpus.path == "text")))
    except InputError:
        raise
    except Exception as error:  # of `datasets` or anything below it
        _find_damage(corpus)
        raise _loading_error(corpus, error) from error


def _loading_error(corpus: HubCorpus, error: Exception) -> InputError:
    """Return what is wrong with a data set, from the error of `datasets`."""
    why = reason(error.__cause__ or error)
    if "scripts are no longer supported" in why:
        remedy = (
            "is a Python script, which datasets does not run: set revision: refs/convert/parquet "
            "if it is on the hub, else convert its data to Parquet"
        )
    elif isinstance(error, ConnectionError):
        remedy = f"its hub is out of reach ({why}): try again, or run `fetch` where it is in reach"
    else:
        remedy = f"cannot be loaded: {why}"
    where = ", ".join(local_files(corpus)) or corpus.path
    return InputError("corpus", where, remedy)


def _find_damage(corpus: HubCorpus) -> None:
    """Read a builder's files here to find the file and line of an error, which `datasets` hides.

    Raises:
        InputError: if a file is damaged; it names the file and the line.
    """
    if corpus.path in ("json", "parquet", "text"):
        for path in local_files(corpus):
            for _ in _file_documents(FileCorpus(path=path, text_field=corpus.text_field), None):
                pass


def _numbered(rows: Any, seed: int | None, streaming: bool) -> Iterator[tuple[int, Any]]:
    if seed is None:
        yield from enumerate(rows)
    elif streaming:
        yield from enumerate(rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER))
    else:
        for row in np.random.default_rng(seed).permutation(len(rows)).tolist():
            yield row, rows[row]


def _check_hub(corpus: HubCorpus) -> str | None:
    import datasets

    if Path(corpus.path).is_file() and not corpus.path.endswith(".py"):
        raise InputError("corpus", corpus.path, "is a file: set kind: file-corpus")
    source = _hub_source(corpus)
    unchecked = f"{corpus.path} was not checked: its hub is out of reach"
    if on_hub(corpus):
        if "/" not in corpus.path and any(map(glob.glob, named_files(corpus))):
            remedy = "is no builder of datasets: json, parquet, csv or text reads files here"
            raise InputError("corpus", corpus.path, remedy)
        if source["path"] == corpus.path and not hub_answers():
            return unchecked
    try:
        builder = datasets.load_dataset_builder(**source)
    except ConnectionError:
        return unchecked
    except Exception as error:  # of `datasets` or anything below it
        raise _loading_error(corpus, error) from error
    columns = builder.info.features
    if columns is not None and corpus.text_field not in columns:
        raise InputError("text_field", corpus.text_field, f"{corpus.path} has only {list(columns)}")
    _check_split(corpus, builder)
    return None


def _check_split(corpus: HubCorpus, builder: Any) -> None:
    known = list(map(str, builder.info.splits or builder.config.data_files or ()))
    wanted = [part.partition("[")[0] for part in corpus.split.split("+")]
    if known and not {*wanted} <= {*known, "all"}:
        raise InputError("split", corpus.split, f"{corpus.path} has only {known}")
    if corpus.streaming and "[" in corpus.split:
        raise InputError("split", corpus.split, "is part of a split: set streaming: false")


def _hub_source(corpus: HubCorpus) -> dict[str, Any]:
    """Return where `datasets` finds a corpus: in a local copy if there is one, else on the hub."""
    copy = copy_of(corpus_item(corpus))
    files = corpus.data_files
    return {
        "path": corpus.path if copy is None else str(copy),
        "name": corpus.name,
        "data_files": list(files) if isinstance(files, tuple) else files,
        "revision": corpus.revision if copy is None else None,
    }


def _testbed_documents(corpus: TestbedCorpus, seed: int | None) -> Iterator[Document]:
    from pipeline.testbed import world

    rows = world.world_documents(corpus.world, corpus.mixture, corpus.split, seed or 0)
    return (Document(name, text) for name, text in rows)
