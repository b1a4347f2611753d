"""The store: artifacts under the keys of their specs, on any fsspec file system.

An artifact's files are written to `data/<key>/<attempt>/`, a name nobody reads. Its manifest
`manifests/<key>.json` is written last, in one step, and is what makes the artifact exist: a writer
that dies leaves nothing that could be read, and two writers of one key end with one of two
equally whole artifacts. `docs/storage.md` says what that rests on for each kind of file system.

A stage that takes hours may keep finished files as `partial/<key>/<time>-<SHA-256>-<name>`, each
written in one step, for the attempt that follows if this one dies.
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

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 22
ORPHAN_SECONDS = 24 * 3600.0
FULL_CHECK_BYTES = 1 << 28

LOCAL = LocalFileSystem()

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "memory"}
"""Protocols without folders: none need be made, and trying to costs a request."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a file system that takes no more."""


class StoreError(RuntimeError):
    """The store cannot be used; the message says why and what to do."""


class CorruptArtifactError(RuntimeError):
    """An artifact's files are not those of its manifest."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(key, problem)
        self.key = key
        self.problem = problem

    def __str__(self) -> str:
        return f"artifact {self.key} is damaged: {self.problem}"


def inside(name: str) -> str:
    """A relative path that does not lead out of its folder.

    Raises:
        ValueError: if it does.
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
    """What an artifact is and how it came to be."""

    model_config = ConfigDict(frozen=True)

    key: str
    kind: str
    """The stage that made it."""
    spec: dict[str, Any]
    """The stage's input, with the specs of all stages before it."""
    data: Inside
    """Its folder, relative to the store."""
    files: dict[Inside, FileRecord]
    """Relative path to size and checksum."""
    report: dict[str, Any]
    """Facts that the stage tells of its work."""
    seconds: float
    peak_memory_bytes: int | None
    versions: dict[str, str]
    host: str
    finished: float
    """Seconds since the epoch."""

    @property
    def bytes(self) -> int:
        """Size of all its files."""
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
        # Others write to the store as well: what a listing once said must not be believed later.
        cached = {"use_listings_cache": False} if "://" in url else {}
        self.fs, root = fsspec.core.url_to_fs(url, **cached)
        self.local = isinstance(self.fs, LocalFileSystem)
        protocols = self.fs.protocol
        self._folders = OBJECT_STORES.isdisjoint(
            {protocols} if isinstance(protocols, str) else protocols
        )
        self.root = os.path.abspath(root) if self.local else root.rstrip("/")
        self.url = self.root if self.local else url
        if self.local and os.path.isfile(self.root):
            raise StoreError(f"store: {self.url!r}: is a file; give a folder or URL")
        self._verified: dict[str, Path] = {}

    # ------------------------------------------------------------------------------ whole store

    def check_writable(self) -> None:
        """Write and remove a probe.

        Raises:
            StoreError: if that fails.
        """
        probe = self._path(f"probe-{uuid.uuid4().hex}")
        try:
            self._make_folder(self.root)
            self.fs.pipe_file(probe, b"calprune")
            self.fs.rm_file(probe)
        except Exception as error:  # every file system has exceptions of its own
            raise StoreError(
                f"store: {self.url!r}: cannot be written ({type(error).__name__}: {error}); "
                "give a folder or URL that you may write to"
            ) from error

    def keys(self) -> set[str]:
        """The keys of all artifacts."""
        return self.names("manifests")

    def sweep(self) -> None:
        """Remove what dead writers left behind more than a day ago.

        What a lease says is being made stays, whatever the writer's clock has put into its name.
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
                    logger.info("removing %s, left by a writer that died", path)
                    self.remove_folder(path)

    def attempts(self) -> list[str]:
        """The folders of all attempts at artifacts, whole or not: full paths."""
        return [path.rstrip("/") for path in self.fs.glob(self._path("data/*/*"))]

    def kept(self) -> list[str]:
        """The files that unfinished attempts have kept: full paths."""
        paths: list[str] = self.fs.glob(self._path("partial/*/*"))
        return paths

    # -------------------------------------------------------------------------------- artifacts

    def manifest(self, key: str) -> Manifest | None:
        """The manifest of an artifact, or None if there is no such artifact.

        Raises:
            CorruptArtifactError: if the manifest itself cannot be read.
        """
        text = self.read(f"manifests/{key}.json")
        if text is None:
            return None
        try:
            return Manifest.model_validate_json(text)
        except ValidationError as error:
            raise CorruptArtifactError(key, "its manifest cannot be read") from error

    def fetch(self, key: str) -> Path:
        """A local folder with the artifact's files, checked against its manifest.

        A remote artifact is copied to a cache beside the machine's temporary files.

        Raises:
            CorruptArtifactError: if it is damaged or not there.
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
        """Which of these artifacts are damaged, and how.

        Args:
            whole: compare all checksums. Else sizes are compared for all, and checksums only in a
                local store and up to 256 MiB an artifact: the rest is checked when it is read.
        """
        with ThreadPoolExecutor(8) as pool:
            problems = pool.map(lambda key: (key, self._damage(key, whole)), sorted(keys))
            return {key: problem for key, problem in problems if problem is not None}

    @contextlib.contextmanager
    def attempt(self, key: str) -> Iterator["Attempt"]:
        """A fresh folder to make an artifact in; removed again unless it is committed."""
        name = f"data/{key}/{time.time():.0f}-{uuid.uuid4().hex}"
        if self.local:
            folder = Path(self._path(name))
            folder.mkdir(parents=True)
        else:
            folder = Path(tempfile.mkdtemp(prefix="calprune-"))
        attempt = Attempt(self, key, name, folder)
        try:
            yield attempt
        finally:
            if not (self.local and attempt.committed):
                shutil.rmtree(folder, ignore_errors=True)

    def discard(self, key: str) -> None:
        """Remove an artifact, the manifest first; what a broken one leaves, `sweep` takes."""
        self._verified.pop(key, None)
        with contextlib.suppress(CorruptArtifactError):
            manifest = self.manifest(key)
            self.remove(f"manifests/{key}.json")
            if manifest is not None:
                self.remove_folder(self._path(manifest.data))
        self.remove(f"manifests/{key}.json")

    # --------------------------------------------------------------------- failures and results

    def record_failure(self, failure: Failure) -> None:
        """Keep why a stage failed, until it succeeds."""
        self.write(f"failures/{failure.key}.json", failure.model_dump_json(indent=1).encode())

    def failure(self, key: str) -> Failure | None:
        """Why a stage failed the last time, or None."""
        text = self.read(f"failures/{key}.json")
        return None if text is None else Failure.model_validate_json(text)

    def clear_failure(self, key: str) -> None:
        """Forget a failure."""
        self.remove(f"failures/{key}.json")

    # ------------------------------------------------------------------------------ single files

    def write(self, name: str, content: bytes) -> str:
        """Write one file in one step; returns its full path.

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
                with contextlib.suppress(OSError):  # what hinders writing may hinder this too
                    Path(temporary).unlink(missing_ok=True)
            raise _unwritable(self.url, name, error) from error
        return path

    def create(self, name: str, content: bytes) -> bool:
        """Write one file unless there is one of that name; returns whether it was written.

        Of several that try at one time one succeeds, on local and shared folders, S3 and GCS.

        Raises:
            StoreError: if it cannot be written for another reason.
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
        """The content of one file; None if there is none."""
        try:
            content: bytes = self.fs.cat_file(self._path(name))
        except FileNotFoundError:
            return None
        return content

    def remove(self, name: str) -> None:
        """Remove one file, if it is there."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self.fs.rm_file(self._path(name))

    def remove_folder(self, path: str) -> None:
        """Remove a folder, by its full path, with all that it holds, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(path, recursive=True)

    def names(self, folder: str) -> set[str]:
        """The JSON files of a folder, without `.json`."""
        try:
            paths = self.fs.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return set()
        return {name[:-5] for path in paths if (name := path.rsplit("/", 1)[-1]).endswith(".json")}

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
                logger.info("removing what was kept of %s, which nobody finished", key)
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
        """Copy an artifact into the node's cache: the first process does, others wait for it."""
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
                    with contextlib.suppress(FileNotFoundError):  # found by the check that follows
                        self.fs.get_file(self._path(f"{manifest.data}/{name}"), str(target))
                Path(temporary, "files").rename(folder)
        return folder


class Attempt:
    """An artifact in the making."""

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
        """Make the folder's files the artifact of the key."""
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
            with contextlib.suppress(Exception):  # the first error is the one to tell
                self.store.remove_folder(self.store._path(self.name))
            if isinstance(error, OSError):
                raise _unwritable(self.store.url, self.name, error) from error
            raise


class Partial:
    """Finished files of an artifact in the making, for another attempt if this one dies."""

    def __init__(self, store: Store, key: str) -> None:
        self.store = store
        self.folder = f"partial/{key}"

    def keep(self, path: Path) -> None:
        """Keep a file under its name; it must not change any more."""
        name = f"{self.folder}/{time.time():.0f}-{_sha256(path)}-{path.name}"
        target = self.store._path(name)
        self.store._make_folder(self.store._path(self.folder))
        if self.store.local:
            temporary = f"{target}.{uuid.uuid4().hex}"
            _link_or_copy(str(path), temporary)
            os.replace(temporary, target)
        else:
            self.store.fs.put_file(str(path), target)

    def restore(self, path: Path) -> bool:
        """Put the file that was kept under that name at `path`.

        Returns:
            False if there is none, or none that is as it was written; damage is reported and
            removed.
        """
        for kept in self._paths():
            digest, _, name = kept.rsplit("/", 1)[-1].partition("-")[2].partition("-")
            if name != path.name:
                continue
            try:
                if self.store.local:
                    _link_or_copy(kept, str(path))
                else:
                    self.store.fs.get_file(kept, str(path))
            except FileNotFoundError:  # another writer was done and has cleared up
                continue
            if _sha256(path) == digest:
                return True
            logger.warning("%s is damaged; it is made again", kept)
            path.unlink()
            self.store.fs.rm_file(kept)
        return False

    def clear(self) -> None:
        """Remove all files that were kept."""
        for kept in self._paths():
            with contextlib.suppress(FileNotFoundError):
                self.store.fs.rm_file(kept)
        if self.store.local:
            with contextlib.suppress(OSError):  # it was never there, or another writer is at work
                os.rmdir(self.store._path(self.folder))

    def _paths(self) -> list[str]:
        folder = self.store._path(self.folder)
        try:
            return sorted(self.store.fs.ls(folder, detail=False))
        except FileNotFoundError:
            return []


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every file system has links
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
    remedy = "free space there" if error.errno in FULL else "see that it can be written"
    return StoreError(f"store: {url!r}: {name} cannot be written ({error}); {remedy} and run again")


def _exists_already(error: OSError) -> bool:
    """Whether an exclusive write found a file there; S3 says so in the response it caused."""
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
