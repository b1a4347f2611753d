"""Each notebook is run from its first cell to its last, in a kernel of its own."""

from pathlib import Path
from typing import Any

import jupytext
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
START = ROOT / "analysis/notebooks/start.py"


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_the_first_notebook_answers_from_a_store_that_the_environment_names(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALPRUNE_STORE", str(store))
    monkeypatch.setenv("CALPRUNE_REFERENCE", "mismatched")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = jupytext.read(START)
    told = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}})
    told.execute()  # raises where a cell does
    found = outputs(notebook)
    figures = [each for each in found if "image/svg+xml" in each.get("data", {})]
    texts = " ".join(
        str(each.get("text", "")) + str(each.get("data", {}).get("text/plain", ""))
        for each in found
    )
    assert len(figures) == 2
    assert "self-generated against mismatched" in texts
    assert "pretraining against mismatched" in texts
    assert "ValueError: <b>bad</b>" in texts
    assert not [each for each in found if each.get("name") == "stderr"]


def test_the_first_notebook_holds_no_output() -> None:
    assert outputs(jupytext.read(START)) == []
