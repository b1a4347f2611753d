from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import analysis
from analysis.labels import DENSE, NO_CALIBRATION, UNSTRUCTURED
from analysis.load import COLUMNS, TableError
from benchmarks.analysis import SEED_STEP, SEEDS, made_table
from jobs import gather
from jobs.cells import Cell
from tests.analysis.conftest import MakeTable


def test_a_store_is_read_with_integer_seeds_and_targets(store: Path) -> None:
    table = analysis.load_results(store)
    assert str(table["seed"].dtype) == "Int64"
    assert str(table["value"].dtype) == "float64"
    assert set(table["target"]) == {"dense", "50 %", "60 %", "70 %", "2:4"}
    assert table.loc[table["pattern"] == "2:4", "target"].unique().tolist() == ["2:4"]
    assert table.loc[table["pruner"] == "dense", "seed"].isna().all()


def test_failed_and_missing_cells_stay_as_one_row_without_value(store: Path) -> None:
    lost = analysis.load_results(store).query("status != 'ok'").set_index("status")
    assert sorted(lost.index) == ["failed", "missing"]
    assert lost[["task", "metric", "value"]].isna().all(axis=None)
    assert lost.loc["failed", "error"] == "ValueError: <b>bad</b>"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_refused(make_table: MakeTable, value: float) -> None:
    sound = {"seed": 0, "value": 2.0}
    broken = {"seed": 1, "cell": "odd", "value": value}
    with pytest.raises(TableError, match=rf"cell odd: questions acc is {value}: .*jobs gather"):
        make_table([sound, broken])


def test_folder_file_and_url_give_the_same_table(store: Path) -> None:
    file = store / "results" / "hand.parquet"
    with fsspec.open("memory://bucket/store/results/hand.parquet", "wb") as remote:
        remote.write(file.read_bytes())
    table = analysis.load_results(str(store))
    pd.testing.assert_frame_equal(analysis.load_results(file), table)
    pd.testing.assert_frame_equal(analysis.load_results("memory://bucket/store"), table)


def test_a_store_on_s3_gives_the_same_table(store: Path, s3: Any) -> None:
    s3.put(str(store / "results"), "analysis-tests/store/results", recursive=True)
    pd.testing.assert_frame_equal(
        analysis.load_results("s3://analysis-tests/store"), analysis.load_results(store)
    )


def test_of_several_grids_the_named_one_is_read(store: Path, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    one = pd.read_parquet(store / "results" / "hand.parquet")
    for grid in ("first", "second"):
        one.assign(grid=grid).to_parquet(tmp_path / "results" / f"{grid}.parquet")
    assert set(analysis.load_results(tmp_path)["grid"]) == {"first", "second"}
    assert set(analysis.load_results(tmp_path, "second")["grid"]) == {"second"}
    with pytest.raises(FileNotFoundError, match=r"third.*first, second.*jobs run GRID"):
        analysis.load_results(tmp_path, "third")


@pytest.mark.parametrize("name", ["", "absent.parquet"])
def test_a_missing_table_is_named_with_the_command_that_makes_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="python -m jobs run GRID"):
        analysis.load_results(tmp_path / name)


def test_the_columns_are_those_that_jobs_write() -> None:
    assert set(COLUMNS) == set(gather.RESULT_COLUMNS)


def test_what_a_cell_lacks_has_the_name_that_jobs_write() -> None:
    dense = gather.cell_fields("grid", Cell.model_validate({"model": "m"}))
    assert (dense["pruner"], dense["calibration"]) == (DENSE, NO_CALIBRATION)
    cell = Cell.model_validate({"model": "m", "pruner": "magnitude", "sparsity": 0.5})
    assert gather.cell_fields("grid", cell)["pattern"] == UNSTRUCTURED


def test_missing_columns_are_named_with_the_file_and_a_remedy(store: Path, tmp_path: Path) -> None:
    for column in COLUMNS:
        whole = pq.read_table(store / "results" / "hand.parquet")
        pq.write_table(whole.drop_columns([column]), tmp_path / "cut.parquet")
        with pytest.raises(ValueError, match=rf"cut\.parquet: .*missing: {column}: .*jobs gather"):
            analysis.load_results(tmp_path / "cut.parquet")


def test_words_for_numbers_are_refused(store: Path, tmp_path: Path) -> None:
    whole = pd.read_parquet(store / "results" / "hand.parquet")
    whole.assign(value="good").to_parquet(tmp_path / "words.parquet")
    with pytest.raises(TableError, match=r"words\.parquet.*column value should be float64"):
        analysis.load_results(tmp_path / "words.parquet")


def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("grid,cell\n")
    with pytest.raises(TableError, match=r"text\.parquet: is not a Parquet file"):
        analysis.load_results(tmp_path / "text.parquet")


def test_a_url_that_nothing_reads_is_refused() -> None:
    with pytest.raises(TableError, match="nosuch"):
        analysis.load_results("nosuch://bucket/store")


def test_categories_are_in_the_order_of_their_meaning(store: Path) -> None:
    table = analysis.load_results(store)
    assert table["status"].cat.categories.tolist() == ["ok", "failed", "missing"]
    assert table["pruner"].cat.categories.tolist() == ["dense", "magnitude", "wanda", "sparsegpt"]
    assert table["target"].cat.categories.tolist() == ["dense", "50 %", "60 %", "70 %", "2:4"]
    assert table["pattern"].cat.categories.tolist() == ["unstructured", "2:4"]
    assert all(table[name].cat.ordered for name in ("pruner", "pattern", "calibration", "method"))


def test_generated_data_follows_corpora_and_settings_go_by_size(make_table: MakeTable) -> None:
    rows = [
        {"calibration": "zoo", "value": 0.5},
        {"calibration": "corpus", "value": 0.5},
        {"calibration": "none", "pruner": "magnitude", "seed": None, "value": 0.4},
        *[
            {"calibration": "a-model", "prefix_tokens": size, "num_samples": 8, "value": 0.6}
            for size in (16, 2)
        ],
    ]
    table = make_table([{"cell": str(number), **row} for number, row in enumerate(rows)])
    assert table["source"].cat.categories.tolist() == [
        "none",
        "corpus",
        "zoo",
        "a-model, 2 prefix tokens",
        "a-model, 16 prefix tokens",
    ]


def test_an_unknown_status_is_refused(store: Path, tmp_path: Path) -> None:
    whole = pd.read_parquet(store / "results" / "hand.parquet")
    whole.assign(status="lost").to_parquet(tmp_path / "odd.parquet")
    with pytest.raises(TableError, match=r"odd\.parquet: status is lost"):
        analysis.load_results(tmp_path / "odd.parquet")


def test_a_large_table_is_loaded_and_grouped_whole(tmp_path: Path) -> None:
    made_table(models=10).to_parquet(tmp_path / "made.parquet")
    table = analysis.load_results(tmp_path / "made.parquet")
    assert len(table) == 100_000
    levels = analysis.summarize(table)
    assert len(levels) == 100_000 // SEEDS
    assert (levels["n"] == SEEDS).all()
    number = levels["calibration"].astype(str).str.removeprefix("calibration-").astype(int)
    expected = 0.001 * number + SEED_STEP * (SEEDS - 1) / 2
    assert levels["mean"].to_numpy() == pytest.approx(expected.to_numpy())
    assert levels["sd"].to_numpy() == pytest.approx(SEED_STEP * np.std(range(SEEDS), ddof=1))


def test_integers_beside_nulls_are_read_exactly(store: Path, tmp_path: Path) -> None:
    large = 2**60 + 1  # not a float64
    written = pq.read_table(store / "results" / "hand.parquet").replace_schema_metadata(None)
    counts = pa.array([large, *[None] * (len(written) - 1)], pa.int64())
    place = written.column_names.index("num_samples")
    pq.write_table(written.set_column(place, "num_samples", counts), tmp_path / "integers.parquet")
    table = analysis.load_results(tmp_path / "integers.parquet")
    assert str(table["num_samples"].dtype) == "Int64"
    assert table["num_samples"].dropna().to_list() == [large]
    assert table["nsamples"].isna().all()
