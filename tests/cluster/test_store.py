import hashlib
import os
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from cluster.store import CorruptArtifactError, Failure, Manifest, Store, StoreError

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


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    url = str(tmp_path / "store") if request.param == "folder" else f"memory://{uuid.uuid4().hex}"
    return Store(url)


def test_an_artifact_comes_back_as_it_was_written(store: Store) -> None:
    manifest = put(store, "windows-1", a=b"alpha", b=b"")
    folder = store.fetch("windows-1")
    assert (folder / "deep/a").read_bytes() == b"alpha"
    assert (folder / "deep/b").read_bytes() == b""
    assert manifest.files["deep/a"].sha256 == hashlib.sha256(b"alpha").hexdigest()
    assert store.manifest("windows-1") == manifest
    assert store.keys() == {"windows-1"}
    assert store.damaged(["windows-1"]) == {}


def test_an_attempt_that_raises_leaves_no_artifact_and_no_files(tmp_path: Path) -> None:
    store = Store(str(tmp_path))

    def break_off() -> None:
        with store.attempt("windows-1") as attempt:
            (attempt.folder / "half").write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    assert store.keys() == set()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


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


def test_a_flipped_byte_in_a_remote_store_is_found_when_it_is_read(tmp_path: Path) -> None:
    store = Store(f"memory://{uuid.uuid4().hex}")
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


def test_of_two_writers_of_one_key_one_whole_artifact_stays(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with store.attempt("windows-1") as first, store.attempt("windows-1") as second:
        (first.folder / "a").write_bytes(b"first")
        (second.folder / "a").write_bytes(b"second")
        second.commit(**FACTS)
        first.commit(**FACTS)
    assert (Store(str(tmp_path)).fetch("windows-1") / "a").read_bytes() == b"first"


def test_success_clears_a_failure(store: Store) -> None:
    failure = Failure(key="k", kind="prune", error="E: no", traceback="Traceback", finished=1.0)
    store.record_failure(failure)
    assert store.failure("k") == failure
    put(store, "k", a=b"")
    assert store.failure("k") is None


def test_the_sweep_takes_what_dead_writers_left_a_day_ago_and_nothing_else(tmp_path: Path) -> None:
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


def test_what_an_attempt_has_kept_is_there_for_the_next_one(store: Store, tmp_path: Path) -> None:
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


def test_nothing_is_kept_of_an_artifact_that_is_there(store: Store) -> None:
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


def test_the_sweep_takes_what_was_kept_only_if_nothing_was_added_for_a_day(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    now = f"{time.time():.0f}"
    for name in ("prune-1/7-aa-layer-0", "prune-1/9-bb-layer-1", "prune-2/7-aa-layer-0"):
        store.write(f"partial/{name}", b"")
    store.write(f"partial/prune-2/{now}-bb-layer-1", b"")
    store.sweep()
    left = sorted(path.name for path in (tmp_path / "store/partial").rglob("*-layer-*"))
    assert left == sorted(["7-aa-layer-0", f"{now}-bb-layer-1"])


def test_a_store_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StoreError, match=r"store: .*file.*cannot be written.*give a folder"):
        Store(str(file)).check_writable()


def test_a_writable_store_is_left_as_it_was(tmp_path: Path) -> None:
    Store(str(tmp_path)).check_writable()
    assert os.listdir(tmp_path) == []
