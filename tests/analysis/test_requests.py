import json
from pathlib import Path

import fsspec
import pandas as pd
import pytest

import analysis
from tests.analysis.conftest import Row, whole_grid, write


def keep_answers(store: Path, key: str, rows: list[Row]) -> None:
    """Add an evaluation's artifact with per-request results to a store."""
    data = f"data/{key}/0-attempt"
    (store / data).mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(store / data / "requests.parquet")
    manifest = {"key": key, "data": data, "files": {"requests.parquet": {"bytes": 1}}}
    (store / "manifests").mkdir(exist_ok=True)
    (store / "manifests" / f"{key}.json").write_text(json.dumps(manifest))


def answers(values: list[float]) -> list[Row]:
    return [
        {"task": "colours", "doc_id": number, "metric": "acc", "value": value}
        for number, value in enumerate(values)
    ]


@pytest.fixture
def answered(tmp_path: Path) -> Path:
    """Return a store in which two cells have per-request results."""
    write(whole_grid(), tmp_path / "results" / "hand.parquet")
    table = analysis.load_results(tmp_path)
    chosen = table.query(
        "method == 'wanda' and target == '60 %' and seed == 0 and task == 'colours'"
    )
    for row in chosen.to_dict("records"):
        values = {"self-generated": [1.0, 1.0, 0.0], "mismatched": [0.0, 1.0, 0.0]}
        if row["calibration"] in values:
            keep_answers(tmp_path, str(row["evaluate_key"]), answers(values[row["calibration"]]))
    return tmp_path


def test_answers_stand_beside_what_names_their_cell(answered: Path) -> None:
    table = analysis.load_results(answered)
    loaded = analysis.load_requests(answered, table[table["calibration"] == "self-generated"])
    ok = loaded[loaded["status"] == "ok"]
    assert ok[["source", "target", "task", "doc_id", "value"]].to_numpy().tolist() == [
        ["self-generated", "60 %", "colours", 0, 1.0],
        ["self-generated", "60 %", "colours", 1, 1.0],
        ["self-generated", "60 %", "colours", 2, 0.0],
    ]
    assert loaded["source"].dtype == table["source"].dtype


def test_cells_without_answers_stay_and_say_why(answered: Path) -> None:
    table = analysis.load_results(answered)
    loaded = analysis.load_requests(answered, table)
    assert set(loaded["cell"]) == set(table["cell"])
    lost = loaded[loaded["status"] == "missing"]
    assert lost["value"].isna().all()
    assert "its evaluation is not in the store" in set(lost["error"].dropna())
    assert (loaded["status"] == "failed").sum() == 1


def test_two_calibrations_are_compared_request_by_request(answered: Path) -> None:
    table = analysis.load_results(answered)
    loaded = analysis.load_requests(answered, table)
    a, b = (loaded[loaded["calibration"] == name] for name in ("self-generated", "mismatched"))
    compared = analysis.compare_selections(a, b)
    paired = compared[compared["pairs"] > 0]
    assert paired[["method", "target", "pairs", "test"]].to_numpy().tolist() == [
        ["wanda", "60 %", 3, "McNemar"]
    ]
    assert paired["effect"].to_list() == pytest.approx([100 / 3])
    assert compared["lost_a"].sum() == 15  # of 16 cells one has answers


def test_a_remote_store_is_read_as_a_folder_is(answered: Path) -> None:
    remote = "memory://requests/store"
    for path in answered.rglob("*.*"):
        if path.is_file():
            with fsspec.open(f"{remote}/{path.relative_to(answered)}", "wb") as file:
                file.write(path.read_bytes())
    table = analysis.load_results(remote)
    pd.testing.assert_frame_equal(
        analysis.load_requests(remote, table), analysis.load_requests(answered, table)
    )


def test_a_store_without_any_answers_is_refused(store: Path) -> None:
    with pytest.raises(
        analysis.TableError, match=r"holds no evaluation of these 53 cells: name the store"
    ):
        analysis.load_requests(store, analysis.load_results(store))
