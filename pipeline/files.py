"""Files on any file system: finding, hashing, and errors that name a remedy."""

import contextlib
import functools
import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import fsspec
import numpy as np

from pipeline.errors import InputError

ANSWER_SECONDS = 30.0
"""Seconds that a server may take to answer whether a bucket exists."""

WHOLE_FILE_BYTES = 64 * 2**20
"""Files up to this size are always hashed whole."""

PIECE_BYTES = 2**20
"""Bytes per read of a hash."""

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Extra of calprune with the client of a protocol."""

_NO_BUCKET = {"file", "local", "memory", "http", "https", "hf"}
"""Protocols without a bucket or a name node."""

_AWS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give the machine a role"
_REFUSED = "access is refused: give credentials that may read and list it"
_SILENT = "does not answer: check the URL, the network and, for S3, AWS_ENDPOINT_URL"
_REMEDIES = {
    "NoCredentialsError": f"there are no credentials: {_AWS}",
    "PartialCredentialsError": f"the credentials are incomplete: {_AWS}",
    "ProfileNotFound": "there is no such profile: correct AWS_PROFILE",
    "DefaultCredentialsError": "there are no credentials: set GOOGLE_APPLICATION_CREDENTIALS",
    "RefreshError": "the credentials have expired: log in again",
    "PermissionError": _REFUSED,
    "TimeoutError": _SILENT,
    "EndpointConnectionError": _SILENT,
    "ConnectionError": _SILENT,
    "HTTPClientError": _SILENT,
    "ClientConnectionError": _SILENT,
}
"""Remedies by the name of the exception's class, whose package may be missing."""


def locate(path: str, field: str = "path") -> tuple[Any, str]:
    """Return the file system of a path or URL, and the path in it.

    Once per process, a remote file system is asked whether its bucket, or name node, exists.

    Raises:
        InputError: if it does not, if it refuses or does not answer, or if its client is missing.
    """
    protocol, separator, rest = path.partition("://")
    with readable(field, path):
        if separator and "::" not in path and protocol not in _NO_BUCKET:
            _ask(f"{protocol}://{rest.split('/')[0]}")
        filesystem, stripped = fsspec.core.url_to_fs(path)
    return filesystem, stripped


@contextlib.contextmanager
def readable(field: str, path: str) -> Iterator[None]:
    """Turn errors of any file system or client into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each client has its own exceptions
        raise InputError(field, path, _remedy(error, path)) from error


def files(path: str, field: str = "path") -> tuple[Any, list[str]]:
    """Return the file system and the sorted files at a path.

    They match a glob, or are all in a folder but hidden ones and `__pycache__`.

    Raises:
        InputError: if there is no file, or the path cannot be reached.
    """
    filesystem, stripped = locate(path, field)
    with readable(field, path):
        if filesystem.isfile(stripped):
            names = [stripped]
        elif filesystem.isdir(stripped):
            inside = len(stripped.rstrip("/")) + 1
            names = [name for name in filesystem.find(stripped) if _is_plain(name[inside:])]
        else:
            names = [name for name in filesystem.glob(stripped) if filesystem.isfile(name)]
    if not names:
        known = "://" in path or Path(path).expanduser().is_absolute()
        folder = "" if known else f", looked up from {Path.cwd()}"
        raise InputError(field, path, f"no file is there{folder}: check the path or glob")
    return filesystem, sorted(names)


def relative(names: list[str]) -> list[str]:
    """Return the files' names below the deepest folder that holds all of them."""
    parents = [PurePosixPath(name).parent for name in names]
    common = parents[0]
    while not all(parent.is_relative_to(common) for parent in parents):
        common = common.parent
    return [str(PurePosixPath(name).relative_to(common)) for name in names]


def fingerprint(*paths: str, field: str = "path", whole_files: bool = True) -> str:
    """Return the SHA-256 of the names, below their common folder, and contents of all files.

    With `whole_files=False`, for a model's folder, a file above 64 MiB counts with its size and 64
    evenly spaced pieces of 1 MiB, first and last included.

    Raises:
        InputError: if there is no file at one of the paths, or one cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        filesystem, names = files(path, field)
        with readable(field, path):
            for name, shown in zip(names, relative(names), strict=True):
                size = filesystem.size(name)
                digest.update(json.dumps([shown, size]).encode())
                whole = whole_files or size <= WHOLE_FILE_BYTES
                with filesystem.open(name, "rb") as stream:
                    for piece in _whole(stream) if whole else _pieces(stream, size):
                        digest.update(piece)
    return digest.hexdigest()


def _whole(stream: IO[bytes]) -> Iterator[bytes]:
    while piece := stream.read(PIECE_BYTES):
        yield piece


def _pieces(stream: IO[bytes], size: int) -> Iterator[bytes]:
    for start in np.linspace(0, size - PIECE_BYTES, 64, dtype=np.int64):
        stream.seek(int(start))
        yield stream.read(PIECE_BYTES)


@functools.cache
def _ask(root: str) -> None:
    """Ask a remote file system for its bucket, and raise its error.

    It runs in a thread, since clients retry for minutes, some already when they are made.
    """
    raised: list[Exception] = []

    def ask() -> None:
        try:
            filesystem, stripped = fsspec.core.url_to_fs(root, skip_instance_cache=True)
            filesystem.info(stripped)
        except PermissionError:  # permission to read a file does not imply one for its bucket
            pass
        except Exception as error:
            raised.append(error)

    asking = threading.Thread(target=ask, name=f"ask {root}", daemon=True)
    asking.start()
    asking.join(ANSWER_SECONDS)
    if asking.is_alive():
        raise TimeoutError(f"no answer from {root} in {ANSWER_SECONDS:.0f} s")
    if raised:
        raise raised[0]


def _remedy(error: Exception, path: str) -> str:
    protocol = path.partition("://")[0] if "://" in path else None
    if isinstance(error, ImportError):
        extra = _EXTRAS.get(protocol or "")
        how = f"install calprune[{extra}]" if extra else str(error)
        return f"its client is not installed: {how}"
    if protocol is None and isinstance(error, FileNotFoundError):
        return "there is no such file"
    if protocol is None:
        return f"cannot be read: {getattr(error, 'strerror', None) or reason(error)}"
    if isinstance(error, FileNotFoundError):
        return "there is no such bucket, or no file of it is there: create it or correct the URL"
    for kind in type(error).__mro__:
        if kind.__name__ in _REMEDIES:
            return _REMEDIES[kind.__name__]
    return f"its file system is not there: {reason(error)}"


def reason(error: BaseException) -> str:
    """Return an exception's message in one line, or its class name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _is_plain(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return not any(part.startswith(".") or part == "__pycache__" for part in parts)
