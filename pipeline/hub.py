"""The hub: whether it answers, what is read from it, and copies for work without it."""

import contextlib
import functools
import hashlib
import http.client
import importlib.util
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from pipeline.errors import InputError
from pipeline.files import reason
from pipeline.specs import HubCorpus, HubModel, LocalModel, canonical_json


class HubItem(NamedTuple):
    """A model or a data set on the hub, or the files of it that are read."""

    kind: Literal["model", "dataset"]
    name: str
    revision: str | None = None
    files: tuple[str, ...] = ()
    """Patterns of the files to copy; empty for all."""

    @property
    def key(self) -> str:
        """Key of its copy in a store."""
        digest = hashlib.sha256(canonical_json(list(self))).hexdigest()
        return f"hub-{self.kind}-{digest[:24]}"


WEB = ("hf://", "http://", "https://")
"""Beginnings of URLs. A key names such files by their place, not by their content."""

CARDS = ("README.md", "*.json", "*.py", ".huggingface.yaml")
"""Files that describe how the others are read."""

DEFAULT_ENDPOINT = "https://huggingface.co"

_copies: dict[HubItem, Path] = {}


def on_hub(corpus: HubCorpus) -> bool:
    """Return whether a corpus is a data set on the hub, not a builder or a local folder."""
    return not is_builder(corpus.path) and not Path(corpus.path).exists()


def local_files(corpus: HubCorpus) -> tuple[str, ...]:
    """Return the paths, globs or URLs of a corpus that are neither on the hub nor on the web.

    These are a folder, or the files for a builder.
    """
    if not is_builder(corpus.path):
        return () if on_hub(corpus) else (corpus.path,)
    return tuple(name for name in named_files(corpus) if not name.startswith(WEB))


def is_builder(name: str) -> bool:
    """Return whether a name is one of `datasets`' own builders of files, such as `json`."""
    found = importlib.util.find_spec("datasets")
    if "/" in name or found is None or found.origin is None:
        return False
    return Path(found.origin).with_name("packaged_modules").joinpath(name, "__init__.py").is_file()


def named_files(corpus: HubCorpus) -> tuple[str, ...]:
    """Return the files that a corpus is restricted to."""
    files = corpus.data_files
    return (files,) if isinstance(files, str) else tuple(files or ())


def model_item(model: HubModel) -> HubItem:
    """Return the item to copy for a model."""
    return HubItem("model", model.name, model.revision)


def corpus_item(corpus: HubCorpus) -> HubItem:
    """Return the item to copy for a corpus: its files, or those of its configuration."""
    files = named_files(corpus)
    if not files and corpus.name is not None:
        files = (f"{corpus.name}/*", f"*/{corpus.name}/*")
    return HubItem("dataset", corpus.path, corpus.revision, files)


def download(item: HubItem, folder: Path) -> None:
    """Copy an item from the hub into a folder.

    Raises:
        InputError: if the hub does not have it or is out of reach.
    """
    import huggingface_hub

    try:
        huggingface_hub.snapshot_download(
            item.name,
            repo_type=item.kind,
            revision=item.revision,
            local_dir=folder,
            allow_patterns=[*item.files, *CARDS] if item.files else None,
        )
    except (OSError, ValueError) as error:  # the hub's errors derive from these
        raise InputError(item.kind, item.name, f"cannot be fetched: {reason(error)}") from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's notes hold times


@contextlib.contextmanager
def used(copies: Mapping[HubItem, Path]) -> Iterator[None]:
    """Read these copies instead of the hub, in this process, within the block."""
    before = dict(_copies)
    _copies.update(copies)
    try:
        yield
    finally:
        _copies.clear()
        _copies.update(before)


def copy_of(item: HubItem) -> Path | None:
    """Return the folder with a copy in use, or None."""
    return _copies.get(item)


def copies_in_use() -> bool:
    """Return whether this process reads any copies instead of the hub."""
    return bool(_copies)


def local_folder(model: HubModel | LocalModel) -> Path | None:
    """Return the folder on this machine with a checkpoint or some of its files.

    It is the model's own, a copy in use, or the hub's cache; None if there is none.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    if isinstance(model, LocalModel):
        return Path(model.path) if Path(model.path).is_dir() else None
    copy = copy_of(model_item(model))
    if copy is not None:
        return copy
    try:
        found = huggingface_hub.try_to_load_from_cache(
            model.name, "config.json", revision=model.revision
        )
    except HFValidationError:  # not a valid name on the hub
        return None
    return Path(found).parent if isinstance(found, str) else None


@functools.cache
def hub_answers() -> bool:
    """Return whether the hub answers within ten seconds; its client would retry for a minute.

    Raises:
        InputError: if HF_ENDPOINT is no URL.
    """
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return False
    endpoint = os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT)
    if not endpoint.startswith(("https://", "http://")):
        remedy = f"HF_ENDPOINT is no URL: write {DEFAULT_ENDPOINT}, or a mirror's with https://"
        raise InputError("HF_ENDPOINT", endpoint, remedy)
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=10)
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return True
