"""Run each notebook from its first cell to its last, in a kernel of its own."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jupytext
import pytest
from nbclient import NotebookClient

from analysis.studies import STUDIES
from analysis.study import run_study
from tests.analysis.conftest import DENSE, write
from tests.analysis.planted import CASES, planted

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "analysis/notebooks"
START = NOTEBOOKS / "start.py"


def of_study(name: str) -> Path:
    return NOTEBOOKS / f"{name.replace('-', '_')}.py"


def executed(file: Path) -> list[Any]:
    """Run all cells from the repository's root; return their outputs."""
    notebook = jupytext.read(file)
    assert outputs(notebook) == [], "stored output"
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}})
    client.execute()  # raises where a cell does
    return outputs(notebook)


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def figures(found: list[Any]) -> list[str]:
    drawn = [each.get("data", {}).get("image/svg+xml") for each in found]
    return [figure for figure in drawn if figure is not None]


def texts(found: list[Any]) -> str:
    return " ".join(
        str(each.get("text", "")) + str(each.get("data", {}).get("text/plain", ""))
        for each in found
    )


def warned(found: list[Any]) -> list[Any]:
    return [each for each in found if each.get("name") == "stderr"]


def test_the_first_notebook_answers_from_a_store_that_the_environment_names(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALPRUNE_STORE", str(store))
    monkeypatch.setenv("CALPRUNE_REFERENCE", "mismatched")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = executed(START)
    assert len(figures(found)) == 2
    assert "self-generated against mismatched" in texts(found)
    assert "pretraining against mismatched" in texts(found)
    assert "ValueError: <b>bad</b>" in texts(found)
    assert warned(found) == []


def test_every_study_has_a_notebook_that_opens_with_its_question() -> None:
    there = {file for file in NOTEBOOKS.iterdir() if file.is_file()} - {START}
    assert there == {of_study(name) for name in STUDIES}
    for name, study in STUDIES.items():
        opening = " ".join(jupytext.read(of_study(name)).cells[0].source.split())
        assert opening.startswith(f"# {study.question} Main contrast: {study.contrast}.")
        assert f"analysis/studies/{name}.yaml" in opening


def keep_results(name: str, store: Path) -> None:
    """Write a grid's results with the study's planted effect, a dense model and a failed cell."""
    settings, effect, _, _ = CASES[name]
    rows = planted(settings(), effect)
    if name == "predictor":
        rows = [row for row in rows if row["sparsity"] == 0.5]  # its mixed models take seconds
    lost = {**rows[-1], "cell": "lost", "seed": 9, "status": "failed", "error": "OSError: full"}
    lost |= {"task": None, "metric": None, "value": None}
    dense = {**rows[0], **DENSE, "cell": "dense", "value": 2.0}
    table = [{**row, "grid": name} for row in (dense, *rows, lost)]
    write(table, store / "results" / f"{name}.parquet")


@pytest.fixture
def use_store(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Set the kernels' store in the environment."""

    def name(store: str) -> None:
        monkeypatch.setenv("CALPRUNE_STORE", store)
        monkeypatch.delenv("CALPRUNE_GRID", raising=False)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")

    return name


@pytest.mark.parametrize("name", STUDIES)
def test_a_studys_notebook_prints_and_draws_its_finding_from_a_store(
    name: str, tmp_path: Path, use_store: Callable[[str], None]
) -> None:
    keep_results(name, tmp_path)
    use_store(str(tmp_path))
    found = executed(of_study(name))
    finding = run_study(STUDIES[name], str(tmp_path)).finding
    assert finding in " ".join(texts(found).split())
    assert re.search(r"Left out of \d+ cells: 1 failed\.", finding)
    assert len(figures(found)) == 1
    assert warned(found) == []


def test_a_studys_notebook_reads_a_remote_store(
    tmp_path: Path, s3: Any, use_store: Callable[[str], None]
) -> None:
    keep_results("amount", tmp_path)
    s3.put(str(tmp_path / "results"), "analysis-tests/store/results", recursive=True)
    use_store("s3://analysis-tests/store")
    found = executed(of_study("amount"))
    finding = run_study(STUDIES["amount"], str(tmp_path)).finding
    assert finding in " ".join(texts(found).split())
    assert len(figures(found)) == 1
    assert warned(found) == []
