import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.grid_scale import count_requests
from cluster.graph import Stage
from cluster.helpers import Helpers
from cluster.store import CorruptArtifactError, Failure, Manifest, Partial, Store, StoreError
from cluster.worker import Maker, make_artifact
from tests.s3 import BUCKET, S3Server

FACTS: dict[str, Any] = {
    "kind": "windows",
    "spec": {"kind": "windows", "seed": 1},
    "report": {"documents": 3},
    "seconds": 1.5,
    "peak_memory_bytes": 1 << 20,
    "versions": {"torch": "2"},
    "host": "here",
}


def put(store: Store, key: str, **files: bytes) -> Manifest:
    with store.attempt(key) as attempt:
        for name, content in files.items():
            (attempt.folder / "deep").mkdir(exist_ok=True)
            (attempt.folder / "deep" / name).write_bytes(content)
        return attempt.commit(**FACTS)


@pytest.fixture(params=["folder", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    name = uuid.uuid4().hex
    if request.param == "s3":
        request.getfixturevalue("s3")
        return Store(f"s3://{BUCKET}/{name}")
    return Store(str(tmp_path / "store") if request.param == "folder" else f"memory://{name}")


def contents(store: Store) -> dict[str, bytes]:
    """Return all files of a store, by their path in it."""
    paths = store.fs.find(store.root)
    return {path.removeprefix(f"{store.root}/"): store.fs.cat_file(path) for path in paths}


def test_an_artifact_comes_back_as_it_was_written(store: Store) -> None:
    manifest = put(store, "windows-1", a=b"alpha", b=b"")
    folder = store.fetch("windows-1")
    assert (folder / "deep/a").read_bytes() == b"alpha"
    assert (folder / "deep/b").read_bytes() == b""
    assert manifest.files["deep/a"].sha256 == hashlib.sha256(b"alpha").hexdigest()
    assert store.manifest("windows-1") == manifest
    assert store.keys() == {"windows-1"}
    assert store.damaged(["windows-1"]) == {}


def test_an_attempt_that_raises_leaves_no_artifact_and_no_files(store: Store) -> None:
    def break_off() -> None:
        with store.attempt("windows-1") as attempt:
            (attempt.folder / "half").write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    assert store.keys() == set()
    assert contents(store) == {}


def test_files_without_a_manifest_are_no_artifact(store: Store) -> None:
    store.write("data/windows-1/5-dead/a", b"half")
    assert store.keys() == set()
    with pytest.raises(CorruptArtifactError, match="not in the store"):
        store.fetch("windows-1")


def test_a_flipped_byte_is_found_and_never_read(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    manifest = put(store, "windows-1", a=b"alpha")
    (tmp_path / manifest.data / "deep/a").write_bytes(b"alphb")
    assert "checksum of deep/a" in store.damaged(["windows-1"])["windows-1"]
    with pytest.raises(CorruptArtifactError, match="checksum of deep/a"):
        Store(str(tmp_path)).fetch("windows-1")


@pytest.mark.parametrize(("beyond", "found"), [(0, True), (1, False)])
def test_checksums_are_compared_up_to_a_size_or_if_they_are_asked_for(
    beyond: int, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    manifest = put(store, "windows-1", a=b"alpha", b=b"beta")
    (tmp_path / manifest.data / "deep/a").write_bytes(b"alphb")
    monkeypatch.setattr("cluster.store.FULL_CHECK_BYTES", len(b"alphabeta") - beyond)
    assert bool(store.damaged(["windows-1"])) == found
    assert store.damaged(["windows-1"], whole=True)


@pytest.mark.parametrize("name", ["/etc/a", "../a", "data/../../a", "data\\..\\a"])
def test_a_name_that_leads_out_of_the_store_is_refused(name: str, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    for use in (store.read, store.remove, lambda name: store.write(name, b"")):
        with pytest.raises(StoreError, match="leads out of the store"):
            use(name)
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_byte_is_found_when_it_is_read(store: Store) -> None:
    manifest = put(store, "windows-1", a=b"alpha")
    store.write(f"{manifest.data}/deep/a", b"alphb")
    with pytest.raises(CorruptArtifactError, match="checksum of deep/a"):
        store.fetch("windows-1")
    store.write(f"{manifest.data}/deep/a", b"alpha")
    assert (store.fetch("windows-1") / "deep/a").read_bytes() == b"alpha"


@pytest.mark.parametrize("content", [None, b"alph"])
def test_a_missing_or_short_file_is_damage(store: Store, content: bytes | None) -> None:
    manifest = put(store, "windows-1", a=b"alpha")
    path = f"{store.root}/{manifest.data}/deep/a"
    store.fs.rm_file(path)
    if content is not None:
        store.fs.pipe_file(path, content)
    assert "deep/a" in store.damaged(["windows-1"])["windows-1"]
    with pytest.raises(CorruptArtifactError, match="deep/a"):
        store.fetch("windows-1")


def test_an_unreadable_manifest_is_damage_and_can_be_discarded(store: Store) -> None:
    put(store, "windows-1", a=b"alpha")
    store.write("manifests/windows-1.json", b'{"key": "windows-1"')
    assert "manifest" in store.damaged(["windows-1"])["windows-1"]
    store.discard("windows-1")
    assert store.keys() == set()


def test_a_discarded_artifact_can_be_made_again(store: Store) -> None:
    put(store, "windows-1", a=b"alpha")
    store.fetch("windows-1")
    store.discard("windows-1")
    assert store.manifest("windows-1") is None
    put(store, "windows-1", a=b"beta")
    assert (store.fetch("windows-1") / "deep/a").read_bytes() == b"beta"


def test_two_writers_of_one_key_leave_one_whole_artifact(store: Store) -> None:
    with store.attempt("windows-1") as first, store.attempt("windows-1") as second:
        (first.folder / "a").write_bytes(b"first")
        (second.folder / "a").write_bytes(b"second")
        second.commit(**FACTS)
        first.commit(**FACTS)
    assert (Store(store.url).fetch("windows-1") / "a").read_bytes() == b"first"


def test_concurrent_writers_of_one_key_leave_one_whole_artifact(store: Store) -> None:
    def write(number: int) -> Manifest:
        return put(Store(store.url), "windows-1", a=bytes([number]) * 5000, b=bytes([number]))

    with ThreadPoolExecutor(4) as pool:
        written = list(pool.map(write, range(8)))
    assert store.manifest("windows-1") in written
    folder = store.fetch("windows-1")
    assert (folder / "deep/a").read_bytes() == (folder / "deep/b").read_bytes() * 5000


def test_one_of_several_writers_creates_a_file(store: Store) -> None:
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda word: store.create("leases/k.json", word), [b"a", b"b"] * 4))
    assert done.count(True) == 1
    assert store.read("leases/k.json") in (b"a", b"b")
    assert store.names("leases") == {"k"}


def test_processes_of_a_node_fetch_a_remote_artifact_once(s3: S3Server) -> None:
    store = Store(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    manifest = put(store, "windows-1", a=b"alpha" * 1000, b=b"beta")
    before = len(s3.requests)
    with ThreadPoolExecutor(4) as pool:  # the lock is a file's, so threads stand for processes
        folders = set(pool.map(lambda _: Store(store.url).fetch("windows-1"), range(4)))
    assert len(folders) == 1
    fetched = [each for each in s3.requests[before:] if manifest.data in each and "GET" in each]
    assert len(fetched) == 2


def test_success_clears_a_failure(store: Store) -> None:
    failure = Failure(key="k", kind="prune", error="E: no", traceback="Traceback", finished=1.0)
    store.record_failure(failure)
    assert store.failure("k") == failure
    put(store, "k", a=b"")
    assert store.failure("k") is None


def test_the_sweep_removes_only_what_dead_writers_left_a_day_ago(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    manifest = put(store, "windows-1", a=b"alpha")
    put(store, "windows-2", a=b"alpha")
    old = tmp_path / manifest.data
    aged = old.with_name("5-" + manifest.data.rsplit("-", 1)[1])
    old.rename(aged)
    text = (tmp_path / "manifests/windows-1.json").read_text()
    (tmp_path / "manifests/windows-1.json").write_text(text.replace(old.name, aged.name))
    dead, fresh = tmp_path / "data/windows-1/7-dead", tmp_path / "data/windows-3/9999999999-at-work"
    for folder in (dead, fresh):
        folder.mkdir(parents=True)
        (folder / "a").write_bytes(b"half")
    store.sweep()
    assert not dead.exists()
    assert fresh.exists()
    assert store.damaged(["windows-1", "windows-2"]) == {}


def finished(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(content)
    return path


def test_files_that_an_attempt_kept_are_restored_by_the_next_one(
    store: Store, tmp_path: Path
) -> None:
    def die() -> None:
        with store.attempt("prune-1") as attempt:
            attempt.partial.keep(finished(attempt.folder, "layer-0", b"alpha"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        die()
    assert store.keys() == set()
    again = Store(store.url)
    with again.attempt("prune-1") as attempt:
        assert attempt.partial.restore(attempt.folder / "layer-0")
        assert (attempt.folder / "layer-0").read_bytes() == b"alpha"
        assert not attempt.partial.restore(attempt.folder / "layer-1")
        manifest = attempt.commit(**FACTS)
    assert set(manifest.files) == {"layer-0"}
    assert (again.fetch("prune-1") / "layer-0").read_bytes() == b"alpha"
    with store.attempt("prune-2") as attempt:
        assert not attempt.partial.restore(attempt.folder / "layer-0")


def test_a_finished_artifact_has_no_kept_files(store: Store) -> None:
    with store.attempt("prune-1") as attempt:
        attempt.partial.keep(finished(attempt.folder, "layer-0", b"alpha"))
        attempt.commit(**FACTS)
    assert [path for path in store.fs.find(store.root) if "partial" in path] == []
    with store.attempt("prune-1") as attempt:
        assert not attempt.partial.restore(attempt.folder / "layer-0")


def test_a_kept_file_that_is_damaged_is_never_restored(store: Store, tmp_path: Path) -> None:
    with store.attempt("prune-1") as attempt:
        attempt.partial.keep(finished(tmp_path / "made", "layer-0", b"alpha"))
    (kept,) = [path for path in store.fs.find(store.root) if "partial" in path]
    store.fs.rm_file(kept)
    store.fs.pipe_file(kept, b"alphb")
    with store.attempt("prune-1") as attempt:
        target = attempt.folder / "layer-0"
        assert not attempt.partial.restore(target)
        assert not target.exists()
        assert not store.fs.exists(kept)
        attempt.partial.keep(finished(attempt.folder, "layer-0", b"alpha"))
        target.unlink()
        assert attempt.partial.restore(target)


def test_the_sweep_removes_kept_files_only_after_a_day_without_a_new_one(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    now = f"{time.time():.0f}"
    for name in ("prune-1/7-aa-layer-0", "prune-1/9-bb-layer-1", "prune-2/7-aa-layer-0"):
        store.write(f"partial/{name}", b"")
    store.write(f"partial/prune-2/{now}-bb-layer-1", b"")
    store.sweep()
    left = sorted(path.name for path in (tmp_path / "store/partial").rglob("*-layer-*"))
    assert left == sorted(["7-aa-layer-0", f"{now}-bb-layer-1"])


def test_the_sweep_leaves_stages_under_a_lease(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for name in ("data/windows-1/7-old/a", "partial/windows-1/7-aa-layer-0"):
        store.write(name, b"")
    store.create("leases/windows-1.json", b"run")
    store.sweep()
    assert sorted(contents(store)) == [
        "data/windows-1/7-old/a",
        "leases/windows-1.json",
        "partial/windows-1/7-aa-layer-0",
    ]
    store.remove("leases/windows-1.json")
    store.sweep()
    assert contents(store) == {}


def requests(of: S3Server, store: Store) -> list[str]:
    """Return the requests since the last call: method, and path without the store and attempt."""
    taken = [request.replace(f"/{store.root}/", "") for request in of.requests]
    of.requests.clear()
    return [re.sub(r"(data/[^/]+)/[^/]+", r"\1", request) for request in taken]


def test_a_stage_makes_no_request_that_it_can_do_without(s3: S3Server) -> None:
    store = Store(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    put(store, "input", a=b"alpha")

    def execute(
        payload: str,
        artifacts: Mapping[str, Path],
        output: Path,
        cpus: int,
        partial: Partial,
        helpers: Helpers,
    ) -> dict[str, Any]:
        (output / "b").write_bytes(b"beta")
        return {}

    stage = Stage(key="k", kind="k", label="", spec={}, payload="", inputs=("input",))
    requests(s3, store)
    make_artifact(stage, Maker(execute, store.url, {}, "run"), frozenset())
    assert requests(s3, store) == [
        "PUT leases/k.json",  # fails if there is one
        "GET manifests/k.json",  # another run may have made it
        "GET manifests/input.json",
        "GET data/input/deep/a",
        "PUT data/k/b",
        "PUT manifests/k.json",
        "DELETE failures/k.json",
        "GET leases/k.json",  # it may have been taken over
        "DELETE leases/k.json",
    ]


def test_the_requests_of_a_stage_do_not_grow_with_the_store(s3: S3Server) -> None:
    s3.requests.clear()
    (few, begin_few), (many, begin_many) = (count_requests(s3, stages) for stages in (3, 9))
    assert few["PUT"] == 3 * 3
    assert many["PUT"] == 3 * 9
    assert many["GET"] - few["GET"] == 4 * 6  # the lease, two manifests, the input
    assert begin_few == begin_many


def test_neither_artifacts_nor_kept_files_are_listed_one_at_a_time(s3: S3Server) -> None:
    store = Store(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    for number in range(5):
        put(store, f"k-{number}", a=b"alpha")
    s3.requests.clear()
    found = store.attempts()
    assert len(s3.requests) == 1
    assert sorted(path.rsplit("/", 2)[-2] for path in found) == [f"k-{n}" for n in range(5)]
    s3.requests.clear()
    with store.attempt("prune-1") as attempt:
        assert not any(attempt.partial.restore(attempt.folder / f"l-{n}") for n in range(9))
    assert len(s3.requests) <= 2  # s3fs looks twice for an empty folder


def test_throttling_and_server_errors_are_retried(s3: S3Server) -> None:
    store = Store(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    s3.every, s3.refused = 3, 0
    try:
        for number in range(2):
            put(store, f"windows-{number}", a=bytes([number]) * 1000)
        assert len(store.keys()) == 2
        for number in range(2):
            assert store.create(f"leases/{number}.json", b"")
            folder = Store(store.url).fetch(f"windows-{number}")
            assert (folder / "deep/a").read_bytes() == bytes([number]) * 1000
    finally:
        s3.every = 0
    assert s3.refused > 3


def test_a_server_that_always_fails_gives_an_error_and_leaves_nothing_readable(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    put(store, "windows-1", a=b"alpha")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    impatient = Store(store.url)
    impatient.fs = type(store.fs)(skip_instance_cache=True)
    s3.every = 1
    try:
        with pytest.raises(StoreError, match=r"store: .*cannot be written.*run again"):
            put(impatient, "windows-2", a=b"beta")
    finally:
        s3.every = 0
    assert store.keys() == {"windows-1"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_gives_an_error_that_says_so_and_leaves_nothing_readable(
    small_disk: Path,
) -> None:
    store = Store(str(small_disk))
    put(store, "windows-1", a=b"alpha")
    with pytest.raises(OSError, match="No space left"):
        put(store, "windows-2", a=bytes(2 << 20))
    assert store.keys() == {"windows-1"}
    assert not list(small_disk.glob("data/windows-2/*"))
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
    with pytest.raises(StoreError, match=r"cannot be written.*No space.*free space there"):
        store.write("results/small.csv", bytes(8192))
    assert not list(small_disk.glob("results/*"))
    assert store.damaged(["windows-1"]) == {}


def test_an_unwritable_store_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StoreError, match=r"store: .*file': is a file; give a folder"):
        Store(str(file))
    with pytest.raises(StoreError, match=r"store: .*proc.*cannot be written.*give a folder"):
        Store("/proc/calprune").check_writable()


def test_a_writable_store_is_left_as_it_was(tmp_path: Path) -> None:
    Store(str(tmp_path)).check_writable()
    assert os.listdir(tmp_path) == []
