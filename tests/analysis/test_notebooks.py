"""Run each notebook from its first cell to its last.

All of them share one kernel, whose imports take longer than the notebooks. Before each one its
variables are deleted, and it gets the environment of the test.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

from analysis.studies import STUDIES
from analysis.study import run_study
from tests.analysis.conftest import DENSE, write
from tests.analysis.from_grid import run_planted
from tests.analysis.planted import CASES, DECLARED, planted

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "analysis/notebooks"
START = NOTEBOOKS / "start.py"


def of_study(name: str) -> Path:
    return NOTEBOOKS / f"{name.replace('-', '_')}.py"


Execute = Callable[[Path], list[Any]]


@pytest.fixture(scope="module")
def kernel() -> Iterator[AsyncKernelManager]:
    """Yield a kernel that runs in the repository's root."""
    manager = AsyncKernelManager()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run_sync(manager.start_kernel)(cwd=str(ROOT), env=environment)
    yield manager
    run_sync(manager.shutdown_kernel)(now=True)


@pytest.fixture
def execute(kernel: AsyncKernelManager) -> Execute:
    """Return a function that runs all cells of a notebook and returns their outputs."""

    def run(file: Path) -> list[Any]:
        notebook = jupytext.read(file)
        assert outputs(notebook) == [], "stored output"
        notebook.cells.insert(
            0,
            new_code_cell(
                "%reset -f\n"
                "import os\n"
                "os.environ.clear()\n"
                f"os.environ.update({dict(os.environ)!r})\n"
                "del os"
            ),
        )
        client = NotebookClient(notebook, km=kernel, timeout=120)
        client.execute()  # raises where a cell does
        assert client.kc is not None
        client.kc.stop_channels()
        return outputs(notebook)

    return run


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def cells(notebook: Any) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def figures(found: list[Any]) -> list[str]:
    drawn = [each.get("data", {}).get("image/png") for each in found]
    return [figure for figure in drawn if figure is not None]


def texts(found: list[Any]) -> str:
    return " ".join(
        str(each.get("text", "")) + str(each.get("data", {}).get("text/plain", ""))
        for each in found
    )


def warned(found: list[Any]) -> list[Any]:
    return [each for each in found if each.get("name") == "stderr"]


def test_the_first_notebook_answers_from_a_store_that_the_environment_names(
    store: Path, monkeypatch: pytest.MonkeyPatch, execute: Execute
) -> None:
    monkeypatch.setenv("CALPRUNE_STORE", str(store))
    monkeypatch.setenv("CALPRUNE_REFERENCE", "mismatched")
    found = execute(START)
    assert len(figures(found)) == 2
    assert "self-generated against mismatched" in texts(found)
    assert "pretraining against mismatched" in texts(found)
    code = [cell for cell in jupytext.read(START).cells if cell.cell_type == "code"]
    assert len(code) == 10
    assert "ValueError: <b>bad</b>" in texts(found)
    assert warned(found) == []


def test_every_study_has_a_notebook_that_opens_with_its_question() -> None:
    there = set(NOTEBOOKS.glob("*.py")) - {START}
    assert there == {of_study(name) for name in STUDIES}
    for name, study in STUDIES.items():
        opening = " ".join(jupytext.read(of_study(name)).cells[0].source.split())
        assert opening.startswith(f"# {study.question} Main contrast: {study.contrast}.")
        assert f"analysis/studies/{name}.yaml" in opening


def keep_results(name: str, store: Path) -> None:
    """Write a grid's results with the study's planted effect, a dense model and a failed cell; of a
    study with a design those of its grid."""
    if name in DECLARED:
        run_planted(STUDIES[name], store, DECLARED[name][0])
        return
    settings, effect, _, _ = CASES[name]
    rows = planted(settings(), effect)
    lost = {**rows[-1], "cell": "lost", "seed": 9, "status": "failed", "error": "OSError: full"}
    lost |= {"task": None, "metric": None, "value": None}
    dense = {**rows[0], **DENSE, "cell": "dense", "value": 2.0}
    table = [{**row, "grid": name} for row in (dense, *rows, lost)]
    write(table, store / "results" / f"{name}.parquet")


@pytest.mark.parametrize("name", STUDIES)
def test_a_studys_notebook_prints_and_draws_its_finding_from_a_store(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, execute: Execute
) -> None:
    keep_results(name, tmp_path)
    monkeypatch.setenv("CALPRUNE_STORE", str(tmp_path))
    found = execute(of_study(name))
    finding = run_study(STUDIES[name], str(tmp_path)).finding
    assert finding in " ".join(texts(found).split())
    assert name in DECLARED or re.search(r"Left out of \d+ cells: 1 failed\.", finding)
    assert len(figures(found)) == 1
    assert warned(found) == []


def test_a_studys_notebook_reads_a_remote_store(
    tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch, execute: Execute
) -> None:
    keep_results("amount", tmp_path)
    s3.put(str(tmp_path / "results"), "analysis-tests/store/results", recursive=True)
    monkeypatch.setenv("CALPRUNE_STORE", "s3://analysis-tests/store")
    found = execute(of_study("amount"))
    finding = run_study(STUDIES["amount"], str(tmp_path)).finding
    assert finding in " ".join(texts(found).split())
    assert len(figures(found)) == 1
    assert warned(found) == []


def test_a_kept_notebook_shows_the_cells_of_its_source_and_what_they_gave() -> None:
    kept = sorted(NOTEBOOKS.glob("*.ipynb"))
    assert START.with_suffix(".ipynb") in kept
    for file in kept:
        notebook, source = nbformat.read(file, as_version=4), jupytext.read(file.with_suffix(".py"))
        assert cells(notebook) == cells(source), f"{file}: run `make docs` with its grid's results"
        found = outputs(notebook)
        assert figures(found) != []
        assert warned(found) == []
        assert str(Path.home()) not in texts(found)
