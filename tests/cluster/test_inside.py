"""No name leads out of the store."""

import json
from pathlib import Path

import pytest

from cluster.store import CorruptArtifactError, Failure, Store, StoreError

OUTSIDE = ["../outside", "a/../../outside", "/etc/outside", "..", "a\\..\\outside"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_of_the_store_is_refused(tmp_path: Path, name: str) -> None:
    store = Store(str(tmp_path / "store"))
    failure = Failure(key=f"../{name}", kind="k", error="", traceback="", finished=0.0)
    for use in (
        lambda: store.write(name, b"x"),
        lambda: store.record_failure(failure),
        lambda: store.manifest(f"../{name}"),
    ):
        with pytest.raises(StoreError, match="leads out of the store"):
            use()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("field", "name"), [("data", "../victim"), ("files", "../../victim/file")])
def test_a_manifest_that_names_files_outside_the_store_is_damaged_and_nothing_is_removed(
    tmp_path: Path, field: str, name: str
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("kept")
    store = Store(str(tmp_path / "store"))
    with store.attempt("a") as attempt:
        (attempt.folder / "n").write_text("1")
        manifest = attempt.commit(
            kind="a", spec={}, report={}, seconds=0.0, peak_memory_bytes=None, versions={}, host=""
        )
    forged = manifest.model_dump()
    forged[field] = name if field == "data" else {name: forged["files"]["n"]}
    store.write("manifests/a.json", json.dumps(forged).encode())
    fresh = Store(store.url)
    with pytest.raises(CorruptArtifactError):
        fresh.fetch("a")
    fresh.discard("a")
    assert (victim / "file").read_text() == "kept"
    assert fresh.keys() == set()
