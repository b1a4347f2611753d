"""Reading text: a corpus's documents in its own or a seeded order, and checks before any work."""

import hashlib
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.copies import copy_of, corpus_item
from pipeline.errors import InputError
from pipeline.hub import hub_answers
from pipeline.specs import Corpus, FileCorpus, HubCorpus, TestbedCorpus

SHUFFLE_BUFFER = 10_000
"""Documents among which a streamed hub corpus draws the next one."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
FORMATS = (".jsonl", ".json", ".parquet", ".txt")

WHOLE_FILE_BYTES = 64 * 2**20
"""Files up to this size are always hashed whole."""

TESTBED_SAMPLE = 1000
"""Documents of the endless testbed that a check looks at."""


class Document(NamedTuple):
    """A text and the name that tells where it stands in its corpus."""

    id: str
    text: str


def documents(
    corpus: Corpus, seed: int | None = None, *, blank: bool = False
) -> Iterator[Document]:
    """Each document of a corpus once at most; blank texts are left out, unless `blank` keeps them.

    With a seed the order is random and the seed's own: over all rows of a file corpus, whose texts
    are then held in memory, and of a downloaded hub corpus; over the shards and a buffer of 10,000
    documents of a streamed one, whose ids are then places in that stream.

    Raises:
        InputError: if the corpus cannot be read as it is described, or holds no text.
    """
    match corpus:
        case FileCorpus():
            found = _file_documents(corpus, seed)
        case HubCorpus():
            found = _hub_documents(corpus, seed)
        case TestbedCorpus():
            found = _testbed_documents(corpus, seed)
    kept = (document for document in found if blank or document.text.strip())
    first = next(kept, None)
    if first is None:
        raise InputError("corpus", _source(corpus), "holds no text: every document is blank")
    yield first
    yield from kept


def check_corpus(
    corpus: Corpus, nsamples: int = 1, seqlen: int = 1, *, joined: bool = False
) -> str | None:
    """Find out cheaply that a corpus cannot do: give `nsamples` texts of `seqlen` tokens each.

    `joined` asks only that all texts together hold `seqlen` tokens. No tokenizer is needed: a text
    of b UTF-8 bytes has b + 2 tokens at the most, special ones included. So what is refused would
    surely fail, but what passes may still turn out too short.

    Returns:
        A warning if the corpus could not be looked at because its hub is out of reach.

    Raises:
        InputError: if the corpus cannot be read, or is surely too short.
    """
    if isinstance(corpus, HubCorpus):
        return _check_hub(corpus)
    rows = documents(corpus)
    if isinstance(corpus, TestbedCorpus):
        rows = itertools.islice(rows, TESTBED_SAMPLE)
    tokens = np.array([len(row.text.encode()) + 2 for row in rows])
    source = _source(corpus)
    if joined:
        if tokens.sum() < seqlen and not isinstance(corpus, TestbedCorpus):
            remedy = f"holds at most {tokens.sum()} tokens, {seqlen} are needed: lower seqlen"
            raise InputError("corpus", source, remedy)
        return None
    enough = int((tokens >= seqlen).sum())
    if enough == 0 or (enough < nsamples and not isinstance(corpus, TestbedCorpus)):
        remedy = (
            f"{nsamples} texts of at least {seqlen} tokens are needed; of {len(tokens)} texts "
            f"{enough} can be that long, and the longest has at most {tokens.max()} tokens: "
            "lower seqlen or nsamples, or set packing: concat"
        )
        raise InputError("corpus", source, remedy)
    return None


def fingerprint(path: str, *, whole_files: bool = True) -> str:
    """SHA-256 over the names, below their common folder, and contents of the files at a path.

    A glob stands for the files that match, a folder for all in it but hidden ones and
    `__pycache__`. With `whole_files=False`, for a model's folder, only the size and 64 evenly
    spaced pieces of 1 MiB, first and last included, count of a file above 64 MiB.

    Raises:
        InputError: if there is no file.
    """
    filesystem, names = _files(path)
    digest = hashlib.sha256()
    for name, relative in zip(names, _relative(names), strict=True):
        size = filesystem.size(name)
        digest.update(json.dumps([relative, size]).encode())
        with filesystem.open(name, "rb") as stream:
            if whole_files or size <= WHOLE_FILE_BYTES:
                while piece := stream.read(2**20):
                    digest.update(piece)
            else:
                for start in np.linspace(0, size - 2**20, 64, dtype=np.int64):
                    stream.seek(int(start))
                    digest.update(stream.read(2**20))
    return digest.hexdigest()


def _source(corpus: Corpus) -> str:
    if isinstance(corpus, TestbedCorpus):
        return f"testbed {dict(corpus.mixture)}"
    return corpus.path


# ------------------------------------------------------------------------------------------ files


def _files(path: str) -> tuple[Any, list[str]]:
    try:
        filesystem, stripped = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise InputError("path", path, f"its file system is not there: {error}") from error
    if filesystem.isfile(stripped):
        return filesystem, [stripped]
    if filesystem.isdir(stripped):
        inside = len(stripped.rstrip("/")) + 1
        names = [name for name in filesystem.find(stripped) if _is_plain(name[inside:])]
    else:
        names = [name for name in filesystem.glob(stripped) if filesystem.isfile(name)]
    if not names:
        raise InputError("path", path, "no file is there: check the path or glob")
    return filesystem, sorted(names)


def _is_plain(relative: str) -> bool:
    parts = PurePosixPath(relative).parts
    return not any(part.startswith(".") or part == "__pycache__" for part in parts)


def _relative(names: list[str]) -> list[str]:
    parents = [PurePosixPath(name).parent for name in names]
    common = parents[0]
    while not all(parent.is_relative_to(common) for parent in parents):
        common = common.parent
    return [str(PurePosixPath(name).relative_to(common)) for name in names]


def _file_documents(corpus: FileCorpus, seed: int | None) -> Iterator[Document]:
    filesystem, names = _files(corpus.path)
    for name in names:
        _format(name)
    rows = (
        Document(f"{relative}:{row}", text)
        for name, relative in zip(names, _relative(names), strict=True)
        for row, text in enumerate(_texts(filesystem, name, corpus.text_field))
    )
    if seed is None:
        yield from rows
    else:
        held = list(rows)
        for row in np.random.default_rng(seed).permutation(len(held)):
            yield held[row]


def _format(name: str) -> tuple[str, str | None]:
    """`.jsonl` and the like, and the compression or None."""
    path = PurePosixPath(name)
    compression = COMPRESSIONS.get(path.suffix)
    ending = path.with_suffix("").suffix if compression else path.suffix
    if ending not in FORMATS or (compression and ending == ".parquet"):
        known = ", ".join(FORMATS)
        packed = ", ".join(COMPRESSIONS)
        raise InputError("path", name, f"unknown ending: {known}, the text ones also with {packed}")
    return ending, compression


def _texts(filesystem: Any, name: str, text_field: str) -> Iterator[str]:
    ending, compression = _format(name)
    with filesystem.open(name, "rb") as stream:
        if ending == ".parquet":
            yield from _parquet_texts(stream, name, text_field)
            return
        opened = pa.CompressedInputStream(stream, compression) if compression else stream
        lines = enumerate(io.TextIOWrapper(opened, encoding="utf-8"), start=1)
        try:
            for number, line in lines:
                if ending == ".txt":
                    yield line.rstrip("\n")
                else:
                    yield _json_text(line, f"{name}, line {number}", text_field)
        except UnicodeDecodeError as error:
            raise InputError("path", name, f"is not UTF-8: {error}") from error


def _json_text(line: str, place: str, text_field: str) -> str:
    if not line.strip():
        return ""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        remedy = f"is no JSON ({error}): write one JSON object a line"
        raise InputError("path", place, remedy) from error
    if not isinstance(row, dict):
        raise InputError("path", place, "is no JSON object: write one JSON object a line")
    if text_field not in row:
        raise InputError("text_field", text_field, f"{place} has only {sorted(row)}")
    text = row[text_field]
    if not isinstance(text, str | None):
        raise InputError("text_field", text_field, f"{place} holds {text!r} there, not text")
    return text or ""


def _parquet_texts(stream: Any, name: str, text_field: str) -> Iterator[str]:
    try:
        table = pq.ParquetFile(stream)
    except pa.ArrowInvalid as error:
        raise InputError("path", name, f"is no Parquet file: {error}") from error
    schema = table.schema_arrow
    if text_field not in schema.names:
        raise InputError("text_field", text_field, f"{name} has only {sorted(schema.names)}")
    kind = schema.field(text_field).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError("text_field", text_field, f"{name} holds {kind} there, not text")
    for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
        for text in batch.column(0).to_pylist():
            yield text or ""


# -------------------------------------------------------------------------------- hub and testbed


def _hub_documents(corpus: HubCorpus, seed: int | None) -> Iterator[Document]:
    import datasets

    try:
        rows = datasets.load_dataset(
            **_hub_source(corpus), split=corpus.split, streaming=corpus.streaming
        )
    except (FileNotFoundError, ValueError) as error:
        raise InputError("corpus", corpus.path, f"cannot be loaded: {error}") from error
    for number, row in _numbered(rows, seed, corpus.streaming):
        if corpus.text_field not in row:
            remedy = f"{corpus.path} has only {sorted(row)}"
            raise InputError("text_field", corpus.text_field, remedy)
        text = row[corpus.text_field]
        if not isinstance(text, str | None):
            remedy = f"{corpus.path} holds {text!r} there, not text"
            raise InputError("text_field", corpus.text_field, remedy)
        yield Document(str(number), text or "")


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

    source = _hub_source(corpus)
    if "/" in corpus.path and not Path(source["path"]).exists() and not hub_answers():
        return f"{corpus.path} was not checked: its hub is out of reach"
    try:
        builder = datasets.load_dataset_builder(**source)
    except ConnectionError:
        return f"{corpus.path} was not checked: its hub is out of reach"
    except (FileNotFoundError, ValueError) as error:
        raise InputError("corpus", corpus.path, f"cannot be loaded: {error}") from error
    columns = builder.info.features
    if columns is not None and corpus.text_field not in columns:
        raise InputError("text_field", corpus.text_field, f"{corpus.path} has only {list(columns)}")
    return None


def _hub_source(corpus: HubCorpus) -> dict[str, Any]:
    """Where `datasets` finds it: in a copy, if there is one to use, else on the hub."""
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

    rows = world.documents(corpus.world, corpus.mixture, corpus.split, seed or 0)
    return (Document(name, text) for name, text in rows)
