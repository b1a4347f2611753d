"""Two grids side by side, on tables whose difference is planted."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from analysis.__main__ import app
from analysis.advice import advise
from analysis.compare import compare_grids
from analysis.load import TableError, load_results
from analysis.report import write_report
from analysis.statistics import compare_with_reference
from tests.analysis.conftest import DENSE, MAGNITUDE, write

NAMES = ("before", "after")
SEEDS = (0, 1, 2)


def rows(factor: float = 1.0, dense: float = 5.0, **further: Any) -> list[dict[str, Any]]:
    """Return a dense model, magnitude, and two pruners with two calibrations and three seeds."""
    text = {"task": "prose", "metric": "perplexity"}
    made = [{**DENSE, **text, "value": dense}, {**MAGNITUDE, **text, "value": 40.0}]
    for pruner, source, seed in itertools.product(("wanda", "sparsegpt"), ("a", "b"), SEEDS):
        value = 8.0 + len(pruner) + (source == "b") + 0.1 * seed
        cell = {"pruner": pruner, "calibration": source, "seed": seed, **further}
        made.append({**cell, **text, "value": factor * value})
        made.append({**cell, "task": "prose", "metric": "bits_per_byte", "value": factor + seed})
    return made


def table(folder: Path, made: list[dict[str, Any]]) -> pd.DataFrame:
    path = folder / "results" / "hand.parquet"
    write(made, path)
    return load_results(path)


def test_a_grid_and_its_repetition_have_equal_cells(tmp_path: Path) -> None:
    found = compare_grids(table(tmp_path / "1", rows()), table(tmp_path / "2", rows()), NAMES)
    assert (found.pairs, found.equal, found.unpaired) == (13, 13, (0, 0))
    assert found.dense_equal is True
    assert found.differ == {}
    assert found.summary == ["13 cells are in both, 13 of them with equal numbers."]


def test_a_planted_difference_is_found_in_every_setting(tmp_path: Path) -> None:
    first, second = table(tmp_path / "1", rows()), table(tmp_path / "2", rows(1.1))
    found = compare_grids(first, second, NAMES)
    assert (found.pairs, found.equal) == (13, 1)  # magnitude has no data, so it is equal
    perplexities = found.table[found.table["metric"] == "perplexity"]
    compared = compare_with_reference(perplexities, "before")
    effects = dict(zip(compared["method"], compared["effect"], strict=True))
    assert list(effects) == ["magnitude", "wanda, a", "wanda, b", "sparsegpt, a", "sparsegpt, b"]
    assert [effects.pop("magnitude"), *effects.values()] == pytest.approx([0.0, *[10.0] * 4])
    (advice,) = advise(found.table)
    assert (advice.source, advice.settings) == ("before", 12)
    assert advice.rivals[0].loss.mean == pytest.approx(0.1)


def test_a_setting_with_another_value_divides_no_pair_and_is_named(tmp_path: Path) -> None:
    first = table(tmp_path / "1", rows(num_samples=8, drop_fraction=0.0))
    second = table(tmp_path / "2", rows(0.9, num_samples=8, drop_fraction=0.2))
    found = compare_grids(first, second, NAMES)
    assert found.differ == {"drop_fraction": ("0.0", "0.2")}
    assert found.pairs == 13
    assert found.summary[0] == "drop_fraction: 0.0 in before, 0.2 in after."


def test_cells_of_one_grid_are_counted_and_left_uncompared(tmp_path: Path) -> None:
    fewer = [row for row in rows() if not (row["calibration"] == "b" and row.get("seed") == 2)]
    found = compare_grids(table(tmp_path / "1", rows()), table(tmp_path / "2", fewer), NAMES)
    assert (found.pairs, found.equal, found.unpaired) == (11, 11, (2, 0))
    assert found.summary[-1] == "2 are only in before."


def test_a_failed_cell_is_a_pair_without_equal_numbers(tmp_path: Path) -> None:
    lost = {"status": "failed", "error": "OSError: gone", "task": None, "metric": None}
    made = [{**row, **lost} if row.get("seed") == 2 else row for row in rows()]
    found = compare_grids(table(tmp_path / "1", rows()), table(tmp_path / "2", made), NAMES)
    assert (found.pairs, found.equal) == (13, 9)


def test_another_dense_model_is_a_warning(tmp_path: Path) -> None:
    second = table(tmp_path / "2", rows(dense=5.1))
    found = compare_grids(table(tmp_path / "1", rows()), second, NAMES)
    assert found.dense_equal is False
    assert "Do not read differences as gains" in found.summary[-1]


@pytest.mark.parametrize(
    ("second", "names", "said"),
    [
        ({"model": "other", "seed_shift": 0}, ("one", "one"), "both grids have this name"),
        ({"seed_shift": 10}, NAMES, "no cell is in both: they differ in seed"),
    ],
)
def test_grids_that_cannot_be_compared_are_an_error(
    tmp_path: Path, second: dict[str, Any], names: tuple[str, str], said: str
) -> None:
    calibrated = [row for row in rows() if row["calibration"] != "none"]
    shifted = [{**row, "seed": row["seed"] + second["seed_shift"]} for row in calibrated]
    with pytest.raises(TableError, match=said):
        compare_grids(table(tmp_path / "1", calibrated), table(tmp_path / "2", shifted), names)


def test_the_page_and_the_command_say_which_grid_did_better(tmp_path: Path) -> None:
    table(tmp_path / "1", rows())
    table(tmp_path / "2", rows(0.9))
    stores = [str(tmp_path / name) for name in ("1", "2")]
    result = CliRunner().invoke(app, ["compare", *stores, "--output", str(tmp_path / "page")])
    assert result.exit_code == 0, result.output
    assert "13 cells are in both, 1 of them with equal numbers." in result.output
    assert f"take {stores[1]}" in result.output
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert "13 cells are in both" in page
    assert f'<dd class="take">{stores[1]}</dd>' in page


def test_a_comparison_written_twice_is_equal(tmp_path: Path) -> None:
    first, second = table(tmp_path / "1", rows()), table(tmp_path / "2", rows(1.1))
    pages = [
        write_report(compare_grids(first, second, NAMES).table, tmp_path / name, "before")
        for name in ("x", "y")
    ]
    assert np.unique([page.read_bytes() for page in pages]).size == 1
