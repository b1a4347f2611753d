from pathlib import Path

import fsspec
import pandas as pd
import pytest

import analysis
from analysis.load import ESSENTIAL, TableError


def test_a_store_is_read_with_integer_seeds_and_targets(store: Path) -> None:
    table = analysis.load(store)
    assert str(table["seed"].dtype) == "Int64"
    assert str(table["value"].dtype) == "float64"
    assert set(table["target"]) == {"dense", "50 %", "60 %", "70 %", "2:4"}
    assert table.loc[table["pattern"] == "2:4", "target"].unique().tolist() == ["2:4"]
    assert table.loc[table["pruner"] == "dense", "seed"].isna().all()


def test_failed_and_missing_cells_stay_as_one_row_without_value(store: Path) -> None:
    lost = analysis.load(store).query("status != 'ok'").set_index("status")
    assert sorted(lost.index) == ["failed", "missing"]
    assert lost[["task", "metric", "value"]].isna().all(axis=None)
    assert lost.loc["failed", "error"] == "ValueError: <b>bad</b>"


def test_folder_file_and_url_give_the_same_table(store: Path) -> None:
    file = store / "results" / "hand.parquet"
    with fsspec.open("memory://bucket/store/results/hand.parquet", "wb") as remote:
        remote.write(file.read_bytes())
    table = analysis.load(str(store))
    pd.testing.assert_frame_equal(analysis.load(file), table)
    pd.testing.assert_frame_equal(analysis.load("memory://bucket/store"), table)


def test_of_several_grids_the_named_one_is_read(store: Path, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    one = pd.read_parquet(store / "results" / "hand.parquet")
    for grid in ("first", "second"):
        one.assign(grid=grid).to_parquet(tmp_path / "results" / f"{grid}.parquet")
    assert set(analysis.load(tmp_path)["grid"]) == {"first", "second"}
    assert set(analysis.load(tmp_path, "second")["grid"]) == {"second"}
    with pytest.raises(FileNotFoundError, match=r"third.*first, second.*jobs run GRID"):
        analysis.load(tmp_path, "third")


@pytest.mark.parametrize("name", ["", "absent.parquet"])
def test_what_is_not_there_comes_with_the_command_that_makes_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="python -m jobs run GRID"):
        analysis.load(tmp_path / name)


@pytest.mark.parametrize("column", ESSENTIAL)
def test_a_missing_column_is_named_with_the_file_and_a_remedy(
    store: Path, tmp_path: Path, column: str
) -> None:
    whole = pd.read_parquet(store / "results" / "hand.parquet")
    whole.drop(columns=column).to_parquet(tmp_path / "cut.parquet")
    with pytest.raises(ValueError, match=rf"cut\.parquet.*{column}.*jobs gather"):
        analysis.load(tmp_path / "cut.parquet")


def test_words_for_numbers_are_refused(store: Path, tmp_path: Path) -> None:
    whole = pd.read_parquet(store / "results" / "hand.parquet")
    whole.assign(value="good").to_parquet(tmp_path / "words.parquet")
    with pytest.raises(TableError, match=r"words\.parquet.*column value should be float64"):
        analysis.load(tmp_path / "words.parquet")


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("grid,cell\n")
    with pytest.raises(TableError, match=r"text\.parquet: is no Parquet file"):
        analysis.load(tmp_path / "text.parquet")


def test_a_url_that_nothing_reads_is_refused() -> None:
    with pytest.raises(TableError, match="nosuch"):
        analysis.load("nosuch://bucket/store")
