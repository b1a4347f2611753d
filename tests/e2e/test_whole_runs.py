import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import Finished, command, environment

Finish = tuple[Path, Finished]


def table_bytes(store: Path) -> bytes:
    return (store / "results/tiny.csv").read_bytes()


def manifests(store: Path) -> dict[str, str]:
    """Key to the text of each manifest, which holds when and how the artifact was made."""
    return {path.stem: path.read_text() for path in (store / "manifests").iterdir()}


def checksums(store: Path) -> dict[str, object]:
    return {key: json.loads(text)["files"] for key, text in manifests(store).items()}


def test_a_run_ends_with_a_row_for_every_cell_and_metric(finished: Finish) -> None:
    store, run = finished
    assert run.returncode == 0, run.stderr
    rows = pq.read_table(store / "results/tiny.parquet").to_pylist()
    assert {row["status"] for row in rows} == {"ok"}
    cells = {row["cell"] for row in rows}
    assert len(cells) == 1 + 2 + 2 * 2  # dense, magnitude, and a pruner on two sources
    for cell in cells:
        measured = {(row["task"], row["metric"]) for row in rows if row["cell"] == cell}
        assert {("heldout", "perplexity"), ("testbed_facts", "acc")} <= measured
    for row in rows:
        wanted = 0.0 if row["pruner"] == "dense" else row["sparsity"]
        assert abs(row["measured_sparsity"] - wanted) < 0.01
        assert row["seconds_evaluate"] > 0
        assert json.loads(row["lineage"])["kind"] == "evaluate"


def test_the_dense_model_is_better_than_every_pruned_one(finished: Finish) -> None:
    store, _ = finished
    rows = pq.read_table(store / "results/tiny.parquet").to_pylist()
    perplexity = {row["cell"]: row for row in rows if row["metric"] == "perplexity"}
    dense = [row["value"] for row in perplexity.values() if row["pruner"] == "dense"]
    pruned = [row["value"] for row in perplexity.values() if row["pruner"] != "dense"]
    assert len(dense) == 1
    assert dense[0] < min(pruned)


def test_the_printed_table_names_every_cell_and_where_the_results_are(finished: Finish) -> None:
    store, run = finished
    for word in ("sparsegpt", "self-generated", "2:4", "testbed_facts", "heldout"):
        assert word in run.stdout
    assert str(store / "results/tiny.parquet") in run.stdout.replace("\n", "")


def test_a_second_run_makes_nothing_again(
    finished: Finish, grid: Path, calprune_inside: Callable[..., Finished]
) -> None:
    store, _ = finished
    before = manifests(store)
    again = calprune_inside("run", grid, "--store", store)
    assert again.returncode == 0, again.stderr
    assert "0 to make" in again.stderr
    assert manifests(store) == before


def test_plan_prints_stages_and_what_is_there_and_runs_nothing(
    finished: Finish, grid: Path, tmp_path: Path, calprune_inside: Callable[..., Finished]
) -> None:
    empty = calprune_inside("plan", grid, "--store", tmp_path / "none")
    assert empty.returncode == 0, empty.stderr
    assert "7 cells" in empty.stdout
    assert not (tmp_path / "none").exists()
    full = calprune_inside("plan", grid, "--store", finished[0])
    line = next(line for line in full.stdout.splitlines() if "evaluate" in line)
    assert [word for word in line.split() if word.isdigit()] == ["7", "7", "0"]


def workers_of(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if re.match(r"ray::(make_artifact|Replica|IDLE)", " ".join(process.cmdline())):
                found.append(process)
    return found


@pytest.mark.usefixtures("ray_of_its_own")
def test_a_killed_driver_of_one_worker_loses_nothing_and_ends_with_the_bytes_of_many(
    finished: Finish, begun: Path, grid: Path, calprune_inside: Callable[..., Finished]
) -> None:
    driver = subprocess.Popen(
        command("run", grid, "--workers", "1", "--store", begun),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while len(list(begun.glob("manifests/prune-*.json"))) < 2:
        assert driver.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.05)
    workers = workers_of(driver)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)  # they notice that their driver is gone
    assert alive == []
    before = manifests(begun)
    run = calprune_inside("run", grid, "--workers", "1", "--store", begun)
    assert run.returncode == 0, run.stderr
    after = manifests(begun)
    assert len(before) < len(after)
    assert {key: after[key] for key in before} == before
    assert checksums(begun) == checksums(finished[0])
    assert table_bytes(begun) == table_bytes(finished[0])


@pytest.mark.usefixtures("ray_of_its_own")
def test_a_flipped_byte_is_reported_and_made_again_and_a_cell_that_fails_is_a_row(
    finished: Finish,
    edited: Callable[[str, str], Path],
    calprune_inside: Callable[..., Finished],
    tmp_path: Path,
) -> None:
    """Two artifacts have a flipped byte. A corpus has texts that are each a little too short for a
    window, which only reading tells."""
    store = tmp_path / "store"
    shutil.copytree(finished[0], store)
    windows = next(key for key in manifests(store) if key.startswith("windows-"))
    evaluation = next(key for key in manifests(store) if key.startswith("evaluate-"))
    for key, name in ((windows, "windows.parquet"), (evaluation, "metrics.parquet")):
        (path,) = (store / "data" / key).glob(f"*/{name}")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    notes = tmp_path / "notes.jsonl"
    notes.write_text("\n".join(json.dumps({"text": "the " * 20}) for _ in range(99)))
    corpus = f"  notes: {{kind: file-corpus, path: {notes}}}"
    calibration = "  notes: {corpus: notes}"
    grid = edited("calibrations:\n", f"{corpus}\ncalibrations:\n{calibration}\n")
    grid.write_text(grid.read_text().replace("[pretraining, self", "[notes, pretraining, self"))
    before = manifests(store)
    run = calprune_inside("run", grid, "--workers", "1", "--store", store)
    assert run.returncode == 1
    report = run.stderr.replace("\n", " ")
    for key in (windows, evaluation):
        assert key in report
    assert report.count("damaged") == 2
    changed = {key for key, text in manifests(store).items() if before[key] != text}
    assert changed == {windows, evaluation}
    assert checksums(store) == checksums(finished[0])
    rows = pq.read_table(store / "results/tiny.parquet").to_pylist()
    failed = [row for row in rows if row["status"] == "failed"]
    assert {row["calibration"] for row in failed} == {"notes"}
    assert len(failed) == 2
    for row in failed:
        assert row["error"].startswith("windows: InputError")
        assert "pipeline/data/windows.py" in row["traceback"]
    text = (store / "results/tiny.csv").read_text()
    without = [line for line in text.splitlines() if ",failed," not in line]
    assert set(table_bytes(finished[0]).decode().splitlines()) <= set(without)
    assert run.stdout.count("failed: testbed") == 2
    shown = calprune_inside("show", grid, "--store", store)
    assert shown.stdout.count("failed: testbed") == 2


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("testbed_facts", "testbed_fact", "evaluate.tasks: 'testbed_fact'"),
        ("seqlen: 64\nevaluate", "seqlen: 4096\nevaluate", "seqlen: 4096: model testbed takes"),
        ('"2:4"', '"2:7"', "no multiple of 7"),
        ("sparsegpt", "sparsegtp", "sparsegtp"),
        (
            "mismatched: testbed-mismatched",
            "mismatched: {kind: testbed-corpus, mixture: {fact: 1}}",
            "corpora.mismatched",
        ),
        ("name: tiny", "name: tiny\nspeed: 3", "speed: 3: there is no such field"),
    ],
)
def test_a_mistake_in_a_grid_ends_before_any_work(
    edited: Callable[[str, str], Path],
    calprune_inside: Callable[..., Finished],
    tmp_path: Path,
    old: str,
    new: str,
    words: str,
) -> None:
    run = calprune_inside("run", edited(old, new), "--store", tmp_path / "store")
    assert run.returncode == 2
    assert words in run.stderr
    assert len(run.stderr.strip().splitlines()) <= 2
    assert not (tmp_path / "store/manifests").exists()


def test_a_store_that_cannot_be_written_is_refused(
    grid: Path, tmp_path: Path, calprune_inside: Callable[..., Finished]
) -> None:
    (tmp_path / "file").write_text("")
    run = calprune_inside("run", grid, "--store", tmp_path / "file")
    assert run.returncode == 2
    assert "store:" in run.stderr
    assert "Traceback" not in run.stderr
