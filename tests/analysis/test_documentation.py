"""The code of docs/analysis.md runs as written."""

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import analysis
from tests.analysis.conftest import whole_grid, write
from tests.analysis.test_requests import answers, keep_answers

PAGE = Path(__file__).parents[2] / "docs/analysis.md"


def test_the_pages_code_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / ".calprune"
    rows = [{**row, "grid": "demo"} for row in whole_grid()]
    write(rows, store / "results" / "demo.parquet")
    asked = analysis.load_results(store).query(
        "target == '60 %' and task == 'colours' and seed == 0"
    )
    for key in asked["evaluate_key"]:
        keep_answers(store, str(key), answers([1.0, 0.0, 1.0]))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 10
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    printed = capsys.readouterr().out
    assert "53 cells" in printed
    assert "['dense', '50 %', '60 %', '70 %', '2:4']" in printed
    assert "McNemar" in printed
    assert (names["by_question"]["pairs"] == 3).sum() == 2


def test_every_column_that_is_loaded_is_documented(table: pd.DataFrame) -> None:
    page = PAGE.read_text() + (PAGE.parent / "results.md").read_text()
    assert [column for column in table if f"`{column}`" not in page] == []


def test_the_types_are_those_on_the_page(table: pd.DataFrame) -> None:
    documented = re.findall(
        r"^\| (`.*`) \| (ordered|float64|Int64|categories)", PAGE.read_text(), re.M
    )
    types = {name: kind for names, kind in documented for name in re.findall(r"`(\w+)`", names)}
    for column in table:
        dtype = table[column].dtype
        if not isinstance(dtype, pd.CategoricalDtype):
            assert types.get(column, str(dtype)) == str(dtype)
        else:
            assert types[column] == ("ordered" if dtype.ordered else "categories")
