from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from cluster.store import Failure, Store
from jobs.__main__ import app
from jobs.grid import Grid
from jobs.plan import Plan, make_plan

Content = dict[str, Any]


@pytest.fixture
def plan(content: Content, load: Callable[[Content], Grid]) -> Plan:
    content["cells"] |= {"calibration": "true", "pruner": "wanda", "sparsity": 0.5, "seed": 0}
    return make_plan(load(content))


@pytest.fixture
def grid(plan: Plan, tmp_path: Path) -> Path:
    return tmp_path / "grid.yaml"  # where `load` has written it


@pytest.fixture
def store(plan: Plan, tmp_path: Path) -> Store:
    """A store with all stages of the grid and one of no grid; their content does not matter."""
    store = Store(str(tmp_path / "store"))
    for key, kind in [*((key, stage.kind) for key, stage in plan.graph.items()), ("old", "prune")]:
        with store.attempt(key) as attempt:
            (attempt.folder / "file").write_bytes(bytes(1000))
            attempt.commit(
                kind=kind,
                spec={},
                report={},
                seconds=1.0,
                peak_memory_bytes=None,
                versions={},
                host="here",
            )
    return store


def call(*words: str | Path, store: Store) -> Result:
    return CliRunner().invoke(app, ["store", *map(str, words), "--store", store.url])


def test_ls_names_every_artifact_with_its_size_and_du_sums_them(store: Store) -> None:
    listed = call("ls", store=store)
    assert listed.exit_code == 0
    keys = store.keys()
    assert all(key in listed.stdout for key in keys)
    assert listed.stdout.count("1.0 kB") == len(keys)
    summed = call("du", store=store)
    assert summed.exit_code == 0
    lines = [line.split() for line in summed.stdout.splitlines()]
    prune = next(line for line in lines if "prune" in line)
    assert prune[3] == "2"  # the grid's, and the old one
    assert f"{len(keys)}.0 kB" in summed.stdout


def test_verify_reads_every_file_and_names_damaged_artifacts(store: Store) -> None:
    whole = call("verify", store=store)
    assert whole.exit_code == 0
    assert f"{len(store.keys())} artifacts, 0 damaged" in whole.stdout
    manifest = store.manifest("old")
    assert manifest is not None
    store.write(f"{manifest.data}/file", bytes(999) + b"1")
    broken = call("verify", store=store)
    assert broken.exit_code == 1
    assert "old: the checksum of file is not the one recorded" in broken.stdout


def test_gc_lists_first_and_removes_only_artifacts_that_no_given_grid_reaches(
    store: Store, grid: Path, content: Content, tmp_path: Path
) -> None:
    store.record_failure(Failure(key="older", kind="prune", error="", traceback="", finished=0.0))
    before = store.keys()
    shown = call("gc", grid, store=store)
    assert shown.exit_code == 0
    assert "old\n" in shown.stdout
    assert "1 artifacts, 0 unfinished, 1 failures" in shown.stdout
    assert "--delete removes them" in shown.stdout
    assert store.keys() == before
    removed = call("gc", grid, "--delete", store=store)
    assert "removed" in removed.stdout
    assert store.keys() == before - {"old"}
    assert store.failure("older") is None
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({**content, "cells": {"model": "testbed", "pruner": None}}))
    assert call("gc", other, grid, "--delete", store=store).exit_code == 0
    assert store.keys() == before - {"old"}
    assert call("gc", other, "--delete", store=store).exit_code == 0
    assert store.keys() < before - {"old"}
    left = store.keys()
    assert any(key.startswith("pretrain") for key in left)
