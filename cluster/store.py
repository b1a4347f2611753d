"""The store: artifacts under the keys of their specs, on any fsspec file system.

A writer puts an artifact's files into `data/<key>/<attempt>/`, a folder of its own. It writes the
manifest `manifests/<key>.json` last, atomically, and only then does the artifact exist: a writer
that dies leaves nothing readable, and two writers of one key leave one whole artifact.
`docs/storage.md` says what this needs from each kind of file system.

A stage that takes hours may keep finished files as `partial/<key>/<time>-<SHA-256>-<name>`, each
written atomically, for the next attempt in case this one dies.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, BinaryIO

import filelock
import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from cluster.scratch import SCRATCH_VARIABLE

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 22
ORPHAN_SECONDS = 24 * 3600.0
FULL_CHECK_BYTES = 1 << 28

LOCAL = LocalFileSystem()

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "memory"}
"""Protocols without folders. Making one there would only cost a request."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full file system."""


class StoreError(RuntimeError):
    """The store cannot be used; the message has the reason and the remedy."""


class CorruptArtifactError(RuntimeError):
    """An artifact is missing, or its files differ from its manifest."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(key, problem)
        self.key = key
        self.problem = problem

    def __str__(self) -> str:
        return f"artifact {self.key} is damaged: {self.problem}"


def inside(name: str) -> str:
    """Return a relative path that stays in its folder.

    Raises:
        ValueError: if it leads out.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ValueError(f"{name!r} leads out of the store")
    return name


Inside = Annotated[str, AfterValidator(inside)]


class FileRecord(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(frozen=True)

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What an artifact is and how it was made."""

    model_config = ConfigDict(frozen=True)

    key: str
    kind: str
    """Of the stage that made it."""
    spec: dict[str, Any]
    """The stage's spec, which contains the specs of all stages before it."""
    data: Inside
    """Its folder, relative to the store."""
    files: dict[Inside, FileRecord]
    """By relative path."""
    report: dict[str, Any]
    """Facts about the stage's work, as `execute` returned them."""
    seconds: float
    peak_memory_bytes: int | None
    versions: dict[str, str]
    host: str
    finished: float
    """Seconds since the epoch."""

    @property
    def bytes(self) -> int:
        """Return the size of all its files."""
        return sum(record.bytes for record in self.files.values())


class Failure(BaseModel):
    """Why a stage has no artifact."""

    model_config = ConfigDict(frozen=True)

    key: str
    kind: str
    error: str
    """The exception in one line."""
    traceback: str
    finished: float


class Store:
    """Artifacts, failures and results tables under one fsspec URL.

    Raises:
        StoreError: if the URL is that of a local file.
    """

    def __init__(self, url: str) -> None:
        # Other processes write to the store too, so listings must not be cached.
        cached = {"use_listings_cache": False} if "://" in url else {}
        self.fs, root = fsspec.core.url_to_fs(url, **cached)
        self.local = isinstance(self.fs, LocalFileSystem)
        protocols = {self.fs.protocol} if isinstance(self.fs.protocol, str) else {*self.fs.protocol}
        self._folders = OBJECT_STORES.isdisjoint(protocols)
        # s3fs asks for a file's size before it reads it, to read a large one in parts.
        self._reading = {"max_concurrency": 1} if "s3" in protocols else {}
        self.root = os.path.abspath(root) if self.local else root.rstrip("/")
        self.url = self.root if self.local else url
        if self.local and os.path.isfile(self.root):
            raise StoreError(f"store: {self.url!r}: is a file; give a folder or URL")
        self._verified: dict[str, Path] = {}

    # ------------------------------------------------------------------------------ whole store

    def check_writable(self) -> None:
        """Check that the store can be written, by a probe file.

        Raises:
            StoreError: if it cannot.
        """
        probe = self._path(f"probe-{uuid.uuid4().hex}")
        try:
            self._make_folder(self.root)
            self.fs.pipe_file(probe, b"calprune")
            self.fs.rm_file(probe)
        except Exception as error:  # each file system has its own exceptions
            raise StoreError(
                f"store: {self.url!r}: cannot be written ({type(error).__name__}: {error}); "
                "give a folder or URL that you may write to"
            ) from error

    def keys(self) -> set[str]:
        """Return the keys of all artifacts."""
        return self.names("manifests")

    def sweep(self) -> None:
        """Remove what dead writers left more than a day ago.

        Leave stages under a lease alone: the times in their names come from the writers' clocks,
        which may be wrong.
        """
        leased = self.names("leases")
        self._sweep_partial(leased)
        keys = self.keys()
        attempts: dict[str, list[str]] = defaultdict(list)
        for path in self.attempts():
            attempts[path.rsplit("/", 2)[-2]].append(path)
        for key, paths in attempts.items():
            aged = [path for path in paths if _age(path) > ORPHAN_SECONDS]
            if key in leased or not aged or (key in keys and len(paths) == 1):
                continue
            manifest = self.manifest(key)
            for path in aged:
                if manifest is None or not path.endswith(manifest.data):
                    logger.info("removing %s, left by a dead writer", path)
                    self.remove_folder(path)

    def attempts(self) -> list[str]:
        """Return the full paths of the folders of all attempts, whole or not."""
        if self._folders:
            return [path.rstrip("/") for path in self.fs.glob(self._path("data/*/*"))]
        # A pattern would take a request for each artifact, a flat listing one for 1,000 files.
        folder = self._path("data")
        depth = folder.count("/") + 3
        found = ("/".join(path.split("/")[:depth]) for path in self.fs.find(folder))
        return list(dict.fromkeys(found))

    def kept(self) -> list[str]:
        """Return the full paths of the files that unfinished attempts have kept."""
        paths: list[str] = self.fs.find(self._path("partial"))
        return paths

    # -------------------------------------------------------------------------------- artifacts

    def manifest(self, key: str) -> Manifest | None:
        """Return the manifest of an artifact, or None if there is no such artifact.

        Raises:
            CorruptArtifactError: if the manifest is invalid.
        """
        text = self.read(f"manifests/{key}.json")
        if text is None:
            return None
        try:
            return Manifest.model_validate_json(text)
        except ValidationError as error:
            raise CorruptArtifactError(key, "its manifest cannot be read") from error

    def fetch(self, key: str) -> Path:
        """Return a local folder with the artifact's files, checked against its manifest.

        Copies a remote artifact to a cache in the machine's temporary folder.

        Raises:
            CorruptArtifactError: if it is damaged or missing.
        """
        if key in self._verified:
            return self._verified[key]
        manifest = self.manifest(key)
        if manifest is None:
            raise CorruptArtifactError(key, "it is not in the store")
        folder = Path(self._path(manifest.data)) if self.local else self._download(manifest)
        problem = _first_damage(LOCAL, str(folder), manifest)
        if problem is not None:
            if not self.local:
                shutil.rmtree(folder)
            raise CorruptArtifactError(key, problem)
        self._verified[key] = folder
        return folder

    def damaged(self, keys: Iterable[str], *, whole: bool = False) -> dict[str, str]:
        """Return the damaged ones of these artifacts, each with what is wrong.

        Args:
            whole: compare all checksums. Otherwise compare all sizes, but checksums only in a local
                store and of artifacts up to 256 MiB; the rest is checked when it is read.
        """
        with ThreadPoolExecutor(8) as pool:
            problems = pool.map(lambda key: (key, self._damage(key, whole)), sorted(keys))
            return {key: problem for key, problem in problems if problem is not None}

    @contextlib.contextmanager
    def attempt(self, key: str) -> Iterator["Attempt"]:
        """Provide a new folder to make an artifact in; remove it at the end unless committed."""
        name = f"data/{key}/{time.time():.0f}-{uuid.uuid4().hex}"
        if self.local:
            folder = Path(self._path(name))
            folder.mkdir(parents=True)
        else:
            folder = Path(
                tempfile.mkdtemp(prefix="calprune-", dir=os.environ.get(SCRATCH_VARIABLE))
            )
        attempt = Attempt(self, key, name, folder)
        try:
            yield attempt
        finally:
            if not (self.local and attempt.committed):
                shutil.rmtree(folder, ignore_errors=True)

    def discard(self, key: str) -> None:
        """Remove an artifact, its manifest first. If that is invalid, `sweep` removes the files."""
        self._verified.pop(key, None)
        with contextlib.suppress(CorruptArtifactError):
            manifest = self.manifest(key)
            self.remove(f"manifests/{key}.json")
            if manifest is not None:
                self.remove_folder(self._path(manifest.data))
        self.remove(f"manifests/{key}.json")

    # --------------------------------------------------------------------- failures and results

    def record_failure(self, failure: Failure) -> None:
        """Record why a stage failed, until it succeeds."""
        self.write(f"failures/{failure.key}.json", failure.model_dump_json(indent=1).encode())

    def failure(self, key: str) -> Failure | None:
        """Return why a stage failed last, or None."""
        text = self.read(f"failures/{key}.json")
        return None if text is None else Failure.model_validate_json(text)

    def clear_failure(self, key: str) -> None:
        """Remove the record of a failure."""
        self.remove(f"failures/{key}.json")

    # ------------------------------------------------------------------------------ single files

    def write(self, name: str, content: bytes) -> str:
        """Write one file atomically and return its full path.

        Raises:
            StoreError: if that fails.
        """
        path = self._path(name)
        temporary = f"{path}.{uuid.uuid4().hex}"
        try:
            self._make_folder(self.fs._parent(path))
            if self.local:
                Path(temporary).write_bytes(content)
                os.replace(temporary, path)
            else:
                self.fs.pipe_file(path, content)
        except OSError as error:
            if self.local:
                with contextlib.suppress(OSError):  # what prevents writing may prevent this too
                    Path(temporary).unlink(missing_ok=True)
            raise _unwritable(self.url, name, error) from error
        return path

    def create(self, name: str, content: bytes) -> bool:
        """Write one file unless it exists; return whether it was written.

        Of several concurrent writers exactly one succeeds, on local and shared folders, S3 and GCS.

        Raises:
            StoreError: if writing fails for another reason.
        """
        path = self._path(name)
        try:
            self._make_folder(self.fs._parent(path))
            if self.local:
                with open(path, "xb") as file:
                    file.write(content)
            else:
                self.fs.pipe_file(path, content, mode="create")
        except OSError as error:
            if _exists_already(error):
                return False
            raise _unwritable(self.url, name, error) from error
        return True

    def read(self, name: str) -> bytes | None:
        """Return the content of one file, or None if it does not exist."""
        try:
            content: bytes = self.fs.cat_file(self._path(name), **self._reading)
        except FileNotFoundError:
            return None
        return content

    def remove(self, name: str) -> None:
        """Remove one file if it exists."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self.fs.rm_file(self._path(name))

    def remove_folder(self, path: str) -> None:
        """Remove a folder and its contents, by its full path, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(path, recursive=True)

    def names(self, folder: str, ending: str = ".json") -> set[str]:
        """Return the names of the files with an ending in a folder, without the ending."""
        try:
            paths = self.fs.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return set()
        found = (path.rsplit("/", 1)[-1] for path in paths)
        return {name.removesuffix(ending) for name in found if name.endswith(ending)}

    # ----------------------------------------------------------------------------------- inside

    def _make_folder(self, path: str) -> None:
        if self._folders:
            self.fs.makedirs(path, exist_ok=True)

    def _sweep_partial(self, leased: Collection[str]) -> None:
        newest: dict[str, float] = {}
        for path in self.kept():
            key, name = path.rsplit("/", 2)[-2:]
            newest[key] = max(newest.get(key, 0.0), _attempt_time(name))
        for key, written in newest.items():
            if key not in leased and time.time() - written > ORPHAN_SECONDS:
                logger.info("removing the kept files of %s, which nobody finished", key)
                self.remove_folder(self._path(f"partial/{key}"))

    def _path(self, name: str) -> str:
        try:
            return f"{self.root}/{inside(name)}"
        except ValueError as error:
            raise StoreError(f"store: {error}") from error

    def _damage(self, key: str, whole: bool) -> str | None:
        try:
            manifest = self.manifest(key)
        except CorruptArtifactError as error:
            return error.problem
        if manifest is None:
            return "it is not in the store"
        whole = whole or (self.local and manifest.bytes <= FULL_CHECK_BYTES)
        return _first_damage(self.fs, self._path(manifest.data), manifest, whole=whole)

    def _download(self, manifest: Manifest) -> Path:
        """Copy an artifact into the node's cache; other processes wait for the first."""
        cache = Path(tempfile.gettempdir()) / f"calprune-cache-{os.getuid()}"
        folder = cache / manifest.data
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{folder}.lock"):
            if folder.is_dir():
                return folder
            with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as temporary:
                for name in manifest.files:
                    target = Path(temporary, "files", name)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with contextlib.suppress(FileNotFoundError):  # the check that follows finds it
                        self.fs.get_file(self._path(f"{manifest.data}/{name}"), str(target))
                Path(temporary, "files").rename(folder)
        return folder


class Attempt:
    """An artifact that is being made."""

    def __init__(self, store: Store, key: str, name: str, folder: Path) -> None:
        self.store = store
        self.key = key
        self.name = name
        self.folder = folder
        self.partial = Partial(store, key)
        self.committed = False

    def commit(
        self,
        *,
        kind: str,
        spec: dict[str, Any],
        report: dict[str, Any],
        seconds: float,
        peak_memory_bytes: int | None,
        versions: dict[str, str],
        host: str,
    ) -> Manifest:
        """Turn the folder's files into the artifact of the key."""
        manifest = Manifest(
            key=self.key,
            kind=kind,
            spec=spec,
            data=self.name,
            files=_records(self.folder),
            report=report,
            seconds=seconds,
            peak_memory_bytes=peak_memory_bytes,
            versions=versions,
            host=host,
            finished=time.time(),
        )
        if not self.store.local:
            self._upload(manifest)
        content = json.dumps(manifest.model_dump(mode="json"), sort_keys=True, indent=1)
        self.store.write(f"manifests/{self.key}.json", content.encode())
        self.store.clear_failure(self.key)
        self.committed = True
        self.partial.clear()
        return manifest

    def _upload(self, manifest: Manifest) -> None:
        try:
            for name in manifest.files:
                target = self.store._path(f"{self.name}/{name}")
                self.store._make_folder(self.store.fs._parent(target))
                self.store.fs.put_file(str(self.folder / name), target)
        except BaseException as error:
            with contextlib.suppress(Exception):  # the first error is the one to raise
                self.store.remove_folder(self.store._path(self.name))
            if isinstance(error, OSError):
                raise _unwritable(self.store.url, self.name, error) from error
            raise


class Partial:
    """Finished files of an artifact that is being made, kept in case the attempt dies.

    The store is asked once, at the first use, which files there are: nobody else makes the
    artifact meanwhile. Most stages keep nothing and need no request.
    """

    def __init__(self, store: Store, key: str) -> None:
        self.store = store
        self.folder = f"partial/{key}"
        self._kept: list[str] | None = None
        """Full paths, the oldest first; None before the first use."""

    def keep(self, path: Path) -> None:
        """Keep a file under its name. It must not change afterwards."""
        name = f"{self.folder}/{time.time():.0f}-{_sha256(path)}-{path.name}"
        target = self.store._path(name)
        self.store._make_folder(self.store._path(self.folder))
        if self.store.local:
            temporary = f"{target}.{uuid.uuid4().hex}"
            _link_or_copy(str(path), temporary)
            os.replace(temporary, target)
        else:
            self.store.fs.put_file(str(path), target)
        kept = self._paths()
        if target not in kept:
            kept.append(target)

    def restore(self, path: Path) -> bool:
        """Restore the file that was kept under the name of `path`.

        Returns:
            Whether an undamaged one was found. Damaged ones are logged and removed.
        """
        for kept in list(self._paths()):
            digest, _, name = kept.rsplit("/", 1)[-1].partition("-")[2].partition("-")
            if name != path.name:
                continue
            try:
                if self.store.local:
                    _link_or_copy(kept, str(path))
                else:
                    self.store.fs.get_file(kept, str(path))
            except FileNotFoundError:  # another writer has finished and cleaned up
                continue
            if _sha256(path) == digest:
                return True
            logger.warning("%s is damaged; it is made again", kept)
            path.unlink()
            self.store.fs.rm_file(kept)
            self._paths().remove(kept)
        return False

    def clear(self) -> None:
        """Remove the files that were kept, if this attempt kept or restored any; `Store.sweep`
        removes others."""
        if self._kept is None:
            return
        for kept in self._kept:
            with contextlib.suppress(FileNotFoundError):
                self.store.fs.rm_file(kept)
        if self.store.local:
            with contextlib.suppress(OSError):  # it does not exist, or another writer is at work
                os.rmdir(self.store._path(self.folder))

    def _paths(self) -> list[str]:
        if self._kept is None:
            try:
                found = self.store.fs.ls(self.store._path(self.folder), detail=False)
            except FileNotFoundError:
                found = []
            self._kept = sorted(found)
        return self._kept


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every file system has hard links
        shutil.copyfile(source, target)


def _records(folder: Path) -> dict[str, FileRecord]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): FileRecord(
            bytes=path.stat().st_size, sha256=_sha256(path)
        )
        for path in files
    }


def _first_damage(
    fs: fsspec.AbstractFileSystem, folder: str, manifest: Manifest, *, whole: bool = True
) -> str | None:
    for name, record in manifest.files.items():
        try:
            size = fs.size(f"{folder}/{name}")
            if size != record.bytes:
                return f"{name} has {size} bytes, not {record.bytes}"
            if not whole:
                continue
            with fs.open(f"{folder}/{name}", "rb") as file:
                if _digest(file) != record.sha256:
                    return f"the checksum of {name} is not the one recorded"
        except FileNotFoundError:
            return f"{name} is missing"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return _digest(file)


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _unwritable(url: str, name: str, error: OSError) -> StoreError:
    remedy = "free space there" if error.errno in NO_SPACE else "make it writable"
    return StoreError(f"store: {url!r}: {name} cannot be written ({error}); {remedy} and run again")


def _exists_already(error: OSError) -> bool:
    """Return whether an exclusive write found a file; S3 reports that in its response."""
    response = getattr(error.__cause__, "response", {})
    return isinstance(error, FileExistsError) or response.get("Error", {}).get("Code") in (
        "PreconditionFailed",
        "ConditionalRequestConflict",
    )


def _age(path: str) -> float:
    return time.time() - _attempt_time(path.rsplit("/", 1)[-1])


def _attempt_time(name: str) -> float:
    seconds = name.split("-", 1)[0]
    return float(seconds) if seconds.isdigit() else 0.0
