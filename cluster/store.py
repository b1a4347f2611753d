"""The store: artifacts under the keys of their specs, on any fsspec file system.

An artifact's files are written to `data/<key>/<attempt>/`, a name nobody reads. Its manifest
`manifests/<key>.json` is written last, in one step, and is what makes the artifact exist: a writer
that dies leaves nothing that could be read, and two writers of one key end with one of two
equally whole artifacts.

A stage that takes hours may keep finished files as `partial/<key>/<time>-<SHA-256>-<name>`, each
written in one step, for the attempt that follows if this one dies.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 22
ORPHAN_SECONDS = 24 * 3600.0
FULL_CHECK_BYTES = 1 << 28


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
    """Artifacts, failures and results tables under one fsspec URL."""

    def __init__(self, url: str) -> None:
        self.fs, root = fsspec.core.url_to_fs(url)
        self.local = isinstance(self.fs, LocalFileSystem)
        self.root = os.path.abspath(root) if self.local else root.rstrip("/")
        self.url = self.root if self.local else url
        self._verified: dict[str, Path] = {}

    # ------------------------------------------------------------------------------ whole store

    def check_writable(self) -> None:
        """Write and remove a probe.

        Raises:
            StoreError: if that fails.
        """
        probe = self._path(f"probe-{uuid.uuid4().hex}")
        try:
            self.fs.makedirs(self.root, exist_ok=True)
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
        """Remove what dead writers left behind more than a day ago."""
        self._sweep_partial()
        if not self.fs.isdir(self._path("data")):
            return
        for attempt in self.fs.glob(self._path("data/*/*")):
            key, name = attempt.rstrip("/").rsplit("/", 2)[-2:]
            age = time.time() - _attempt_time(name)
            manifest = self.manifest(key) if age > ORPHAN_SECONDS else None
            if age > ORPHAN_SECONDS and (manifest is None or not manifest.data.endswith(name)):
                logger.info("removing %s, left by a writer that died", attempt)
                self.fs.rm(attempt, recursive=True)

    # -------------------------------------------------------------------------------- artifacts

    def manifest(self, key: str) -> Manifest | None:
        """The manifest of an artifact, or None if there is no such artifact.

        Raises:
            CorruptArtifactError: if the manifest itself cannot be read.
        """
        text = self._read(f"manifests/{key}.json")
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
        problem = _first_damage(folder, manifest)
        if problem is not None:
            if not self.local:
                shutil.rmtree(folder)
            raise CorruptArtifactError(key, problem)
        self._verified[key] = folder
        return folder

    def damaged(self, keys: Iterable[str]) -> dict[str, str]:
        """Which of these artifacts are damaged, and how.

        Sizes are compared for all. Checksums only for a local store and up to 256 MiB an artifact:
        the rest is checked when it is read.
        """
        with ThreadPoolExecutor(8) as pool:
            problems = pool.map(lambda key: (key, self._damage(key)), sorted(keys))
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
            self._remove(f"manifests/{key}.json")
            if manifest is not None and self.fs.isdir(self._path(manifest.data)):
                self.fs.rm(self._path(manifest.data), recursive=True)
        self._remove(f"manifests/{key}.json")

    # --------------------------------------------------------------------- failures and results

    def record_failure(self, failure: Failure) -> None:
        """Keep why a stage failed, until it succeeds."""
        self.write(f"failures/{failure.key}.json", failure.model_dump_json(indent=1).encode())

    def failure(self, key: str) -> Failure | None:
        """Why a stage failed the last time, or None."""
        text = self._read(f"failures/{key}.json")
        return None if text is None else Failure.model_validate_json(text)

    def clear_failure(self, key: str) -> None:
        """Forget a failure."""
        self._remove(f"failures/{key}.json")

    def write(self, name: str, content: bytes) -> str:
        """Write one file in one step; returns its full path."""
        path = self._path(name)
        self.fs.makedirs(self.fs._parent(path), exist_ok=True)
        if self.local:
            temporary = f"{path}.{uuid.uuid4().hex}"
            Path(temporary).write_bytes(content)
            os.replace(temporary, path)
        else:
            self.fs.pipe_file(path, content)
        return path

    # ----------------------------------------------------------------------------------- inside

    def _sweep_partial(self) -> None:
        newest: dict[str, float] = {}
        for path in self.fs.glob(self._path("partial/*/*")):
            key, name = path.rsplit("/", 2)[-2:]
            newest[key] = max(newest.get(key, 0.0), _attempt_time(name))
        for key, written in newest.items():
            if time.time() - written > ORPHAN_SECONDS:
                logger.info("removing what was kept of %s, which nobody finished", key)
                self.fs.rm(self._path(f"partial/{key}"), recursive=True)

    def _path(self, name: str) -> str:
        try:
            return f"{self.root}/{inside(name)}"
        except ValueError as error:
            raise StoreError(f"store: {error}") from error

    def names(self, folder: str) -> set[str]:
        """The names of a folder's JSON files, without their ending."""
        self.fs.invalidate_cache()
        if not self.fs.isdir(self._path(folder)):
            return set()
        paths = self.fs.ls(self._path(folder), detail=False)
        return {name[:-5] for path in paths if (name := path.rsplit("/", 1)[-1]).endswith(".json")}

    def _read(self, name: str) -> bytes | None:
        try:
            content: bytes = self.fs.cat_file(self._path(name))
        except FileNotFoundError:
            return None
        return content

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._path(name))

    def _damage(self, key: str) -> str | None:
        try:
            manifest = self.manifest(key)
        except CorruptArtifactError as error:
            return error.problem
        if manifest is None:
            return "it is not in the store"
        if self.local and manifest.bytes <= FULL_CHECK_BYTES:
            return _first_damage(Path(self._path(manifest.data)), manifest)
        for name, record in manifest.files.items():
            path = self._path(f"{manifest.data}/{name}")
            if not self.fs.exists(path):
                return f"{name} is missing"
            if self.fs.size(path) != record.bytes:
                return f"{name} has {self.fs.size(path)} bytes, not {record.bytes}"
        return None

    def _download(self, manifest: Manifest) -> Path:
        cache = Path(tempfile.gettempdir()) / f"calprune-cache-{os.getuid()}"
        folder = cache / manifest.data
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=cache))
            for name in manifest.files:
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):  # found by the check that follows
                    source = self._path(f"{manifest.data}/{name}")
                    self.fs.get_file(source, str(temporary / name))
            with contextlib.suppress(OSError):  # another process was quicker
                temporary.rename(folder)
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
            for name in manifest.files:
                self.store.fs.makedirs(
                    self.store.fs._parent(self.store._path(f"{self.name}/{name}")), exist_ok=True
                )
                self.store.fs.put_file(
                    str(self.folder / name), self.store._path(f"{self.name}/{name}")
                )
        content = json.dumps(manifest.model_dump(mode="json"), sort_keys=True, indent=1)
        self.store.write(f"manifests/{self.key}.json", content.encode())
        self.store.clear_failure(self.key)
        self.committed = True
        self.partial.clear()
        return manifest


class Partial:
    """Finished files of an artifact in the making, for another attempt if this one dies."""

    def __init__(self, store: Store, key: str) -> None:
        self.store = store
        self.folder = f"partial/{key}"

    def keep(self, path: Path) -> None:
        """Keep a file under its name; it must not change any more."""
        name = f"{self.folder}/{time.time():.0f}-{_sha256(path)}-{path.name}"
        target = self.store._path(name)
        self.store.fs.makedirs(self.store._path(self.folder), exist_ok=True)
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
        self.store.fs.invalidate_cache()
        if not self.store.fs.isdir(folder):
            return []
        return sorted(self.store.fs.ls(folder, detail=False))


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


def _first_damage(folder: Path, manifest: Manifest) -> str | None:
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != record.bytes:
            return f"{name} has {path.stat().st_size} bytes, not {record.bytes}"
        if _sha256(path) != record.sha256:
            return f"the checksum of {name} is not the one recorded"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _attempt_time(name: str) -> float:
    seconds = name.split("-", 1)[0]
    return float(seconds) if seconds.isdigit() else 0.0
