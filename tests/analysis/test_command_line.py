import sys
from pathlib import Path

import fsspec
import pandas as pd
import pytest
from typer.testing import CliRunner

from analysis.__main__ import app, main
from tests.analysis.conftest import MakeTable


def ends(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """Return the exit code of the command as a shell sees it."""
    monkeypatch.setattr(sys, "argv", ["analysis", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def test_a_report_is_printed_and_its_page_is_the_last_line(store: Path, report_page: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(store), "--reference", "mismatched"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[-1] == f"report: {report_page}"
    assert lines[0] == "hand: 51 ok, 1 failed, 1 missing"
    assert any(line.startswith("heldout: perplexity, lower is better: mean ±") for line in lines)
    assert any(line.startswith("mean of 2 tasks: acc (%), higher is better") for line in lines)
    assert sum("difference from mismatched" in line for line in lines) == 2
    assert max(map(len, lines[:-1])) <= 160


def test_printed_values_are_those_of_the_table(make_table: MakeTable, tmp_path: Path) -> None:
    make_table(
        [
            {"calibration": name, "seed": seed, "value": value + 0.01 * seed}
            for name, value in (("corpus", 0.40), ("other", 0.50))
            for seed in (0, 1)
        ]
    )
    run = ["report", str(tmp_path / "hand.parquet"), "--output", str(tmp_path / "out")]
    lines = CliRunner().invoke(app, run).output.splitlines()
    fields = [[field.strip() for field in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert fields[0] == ["tiny", "wanda", "50 %", "", "40.5 ± 0.7", "50.5 ± 0.7", "2"]
    assert fields[1] == [
        *("tiny", "wanda", "50 %", "other", "50.5 ± 0.7"),
        *("+10.0 points (no interval)", "n/a", "2"),
    ]
    assert "reference calibration: corpus. It is the first of the table" in "\n".join(lines)
    assert lines[-1] == f"report: {tmp_path / 'out' / 'index.html'}"


def test_a_store_behind_a_url_is_reported_into_the_working_folder(
    make_table: MakeTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_table([{"value": 0.5}])
    with fsspec.open("memory://far/results/hand.parquet", "wb") as remote:
        remote.write((tmp_path / "hand.parquet").read_bytes())
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["report", "memory://far"])
    assert result.output.splitlines()[-1] == "report: report/hand/index.html"
    assert (tmp_path / "report" / "hand" / "table.csv").is_file()


def test_mistakes_end_with_two_and_what_to_do(
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ends(["report", str(tmp_path)], monkeypatch) == 2
    assert "python -m jobs run GRID" in capsys.readouterr().err
    assert ends(["report", str(store), "--reference", "nothing"], monkeypatch) == 2
    assert "mismatched; pretraining; self-generated" in capsys.readouterr().err
    assert ends(["report", str(store), "--grid", "other"], monkeypatch) == 2
    assert "the store holds hand" in capsys.readouterr().err


def test_of_several_grids_one_must_be_named(
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = pd.read_parquet(store / "results" / "hand.parquet")
    (tmp_path / "results").mkdir()
    for grid in ("first", "second"):
        one.assign(grid=grid).to_parquet(tmp_path / "results" / f"{grid}.parquet")
    assert ends(["report", str(tmp_path)], monkeypatch) == 2
    message = capsys.readouterr().err
    assert "holds grids first, second: choose one with --grid" in message
    assert "Traceback" not in message
