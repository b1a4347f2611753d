"""Copies from the hub. A folder with the same layout takes the place of the hub."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from typer.testing import CliRunner

from cluster import garbage, leases
from cluster.store import Store
from jobs.__main__ import app
from jobs.fetch import OFFLINE, copies, fetch, hub_items, with_copies
from jobs.gather import gather
from jobs.grid import Grid
from jobs.plan import make_plan
from jobs.run import run_grid
from pipeline.errors import InputError

Content = dict[str, Any]
Load = Callable[[Content], Grid]
EXAMPLE = Path(__file__).parents[2] / "examples" / "local_datasets.py"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path) -> Path:
    spec = importlib.util.spec_from_file_location("local_datasets", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path / "hub"
    module.write_datasets(folder, 12, ["anatomy"])
    shutil.copytree(tiny_model_folder / "model", folder / "acme" / "tiny")

    def download(name: str, local_dir: Path, **options: Any) -> None:
        if not (folder / name).is_dir():
            raise OSError(f"404: {name}")
        shutil.copytree(folder / name, local_dir, dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return folder


@pytest.fixture
def grid(content: Content, load: Load) -> Grid:
    content["models"] = {"tiny": {"kind": "hub-model", "name": "acme/tiny", "dtype": "float32"}}
    content["corpora"] = {
        "wikitext": {"preset": "wikitext2", "split": "train"},
        "c4": "c4-validation",
    }
    content["calibrations"] = {"c4": {"corpus": "c4", "packing": "concat"}}
    content["cells"] = {
        "model": "tiny",
        "calibration": "c4",
        "pruner": "wanda",
        "sparsity": 0.5,
        "nsamples": 4,
        "seqlen": 32,
    }
    content["evaluate"] = {
        "perplexity": [{"corpus": "wikitext", "seqlen": 32, "max_windows": 4}],
        "tasks": ["boolq", "arc_easy"],
    }
    return load(content)


def test_all_hub_items_of_a_grid_are_listed(grid: Grid) -> None:
    items = hub_items(make_plan(grid))
    assert sorted((item.kind, item.name, item.files) for item in items) == [
        ("dataset", "Salesforce/wikitext", ("wikitext-2-raw-v1/*", "*/wikitext-2-raw-v1/*")),
        ("dataset", "allenai/ai2_arc", ()),
        ("dataset", "allenai/c4", ("en/c4-validation.00000-of-00008.json.gz",)),
        ("dataset", "aps/super_glue", ()),
        ("model", "acme/tiny", ()),
    ]


@pytest.mark.usefixtures("ray_of_its_own")
def test_a_grid_runs_from_its_copies_with_the_hub_switched_off(
    grid: Grid, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, store = make_plan(grid), Store(str(tmp_path / "store"))
    assert with_copies(plan, store) == (plan.graph, {})
    assert len(fetch(plan, store)) == 5
    assert fetch(plan, store) == []  # once
    graph, variables = with_copies(plan, store)
    assert variables == OFFLINE
    assert {key for key in graph if not key.startswith("hub-")} == set(plan.graph)
    shutil.rmtree(hub)
    before = dict(os.environ)
    outcome = run_grid(plan, store, None, workers=1)
    assert not outcome.failed
    assert dict(os.environ).get("HF_HUB_OFFLINE") == before.get("HF_HUB_OFFLINE")
    rows = gather(plan, store).to_pylist()
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["task"] for row in rows} == {"wikitext", "boolq", "arc_easy"}
    assert {row["samples"] for row in rows if row["task"] != "wikitext"} == {12}


def test_a_missing_hub_item_is_named_and_leaves_nothing_unfinished(
    grid: Grid, hub: Path, tmp_path: Path
) -> None:
    shutil.rmtree(hub / "acme")
    plan, store = make_plan(grid), Store(str(tmp_path / "store"))
    with pytest.raises(InputError, match=r"model: 'acme/tiny': cannot be fetched: 404"):
        fetch(plan, store)
    assert all(item.kind == "dataset" for item in copies(plan, store))


def call(*words: str | Path, store: Store) -> str:
    result = CliRunner().invoke(app, ["store", *map(str, words), "--store", store.url])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.usefixtures("hub")
def test_gc_keeps_copies_that_a_given_grid_or_a_live_run_reads(
    grid: Grid, content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "PULSE_SECONDS", 0.2)
    grid_file = tmp_path / "grid.yaml"  # where `load` has written it
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({**content, "models": {"tiny": "testbed-tiny"}}))
    plan, store = make_plan(grid), Store(str(tmp_path / "store"))
    fetch(plan, store)
    copied = store.keys()
    assert len(copied) == 5
    summed = call("du", store=store)
    assert [line.split()[1:4] for line in summed.splitlines() if "hub-" in line] == [
        ["hub-dataset", "│", "4"],
        ["hub-model", "│", "1"],
    ]
    assert "5 artifacts, 0 damaged" in call("verify", store=store)
    assert all(key in call("ls", store=store) for key in copied)
    call("gc", grid_file, "--delete", store=store)
    assert store.keys() == copied
    model = {key for key in copied if key.startswith("hub-model")}
    graph, _ = with_copies(plan, store)
    # What a run claims is tested where runs are; here it claims what they do.
    with leases.Claim(store, {name for stage in graph.values() for name in stage.inputs}):
        call("gc", other, "--delete", store=store)
        assert store.keys() == copied
    call("gc", other, "--delete", store=store)
    assert store.keys() == copied - model
    call("gc", other, grid_file, "--delete", store=store)
    assert store.keys() == copied - model


@pytest.mark.usefixtures("hub")
def test_gc_removes_nothing_if_a_grids_files_are_missing(
    grid: Grid, content: Content, load: Load, tmp_path: Path
) -> None:
    store = Store(str(tmp_path / "store"))
    fetch(make_plan(grid), store)
    copied = store.keys()
    notes = tmp_path / "notes.txt"
    content["corpora"]["notes"] = {"kind": "file-corpus", "path": str(notes)}
    load(content)
    notes.unlink()
    words = ["store", "gc", str(tmp_path / "grid.yaml"), "--delete", "--store", store.url]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, InputError)
    assert "corpora.notes.path" in str(result.exception)
    assert store.keys() == copied


@pytest.mark.usefixtures("hub")
def test_gc_keeps_a_copy_under_way(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, found = Store(str(tmp_path / "store")), []
    download = huggingface_hub.snapshot_download

    def watched(*words: Any, **options: Any) -> None:
        download(*words, **options)
        monkeypatch.setattr(leases.Observer, "used", lambda observer: set())  # a pulse takes 10 s
        found.append(garbage.find(store, store.keys()).attempts)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", watched)
    fetch(make_plan(grid), store)
    assert found == [[]] * 5
    assert store.names("runs") == store.names("leases") == set()


@pytest.mark.usefixtures("hub")
def test_a_damaged_copy_is_named_and_fetched_again(grid: Grid, tmp_path: Path) -> None:
    plan, store = make_plan(grid), Store(str(tmp_path / "store"))
    fetch(plan, store)
    manifest = store.manifest(hub_items(plan)[-1].key)
    assert manifest is not None
    store.write(f"{manifest.data}/config.json", b"{}")
    fresh = Store(store.url)  # which has read nothing yet
    for read in (copies, with_copies):
        with pytest.raises(InputError, match=r"'acme/tiny': its copy .* is damaged.*`fetch`"):
            read(plan, fresh)
    assert [item.name for item in fetch(plan, fresh)] == ["acme/tiny"]
    assert len(copies(plan, fresh)) == 5


def test_a_corpus_of_a_mixture_is_fetched_too(grid: Grid, content: Content, load: Load) -> None:
    content["calibrations"]["c4"]["corpus"] = {"c4": 1, "wikitext": 1}
    content["evaluate"]["perplexity"] = []
    assert hub_items(make_plan(load(content))) == hub_items(make_plan(grid))
