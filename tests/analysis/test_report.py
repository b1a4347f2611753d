import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.report import chosen_reference, write_report
from tests.analysis.conftest import DENSE, MakeTable


class Links(HTMLParser):
    """A page's links and anchors."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in {"src", "href", "srcset", "data", "action", "poster"}:
                self.targets.append(value or "")
            if name == "id":
                self.anchors.add(value or "")


@pytest.fixture(scope="module")
def folder(report_page: Path) -> Path:
    return report_page.parent


@pytest.fixture(scope="module")
def page(report_page: Path) -> str:
    return report_page.read_text(encoding="utf-8")


def plain(page: str) -> str:
    """Return the page's text without tags and scripts."""
    body = re.sub(r"<script.*?</script>", " ", page.partition("<body>")[2], flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def test_the_page_refers_to_nothing_outside_itself(page: str) -> None:
    links = Links(page)
    inner = {target[1:] for target in links.targets if target.startswith("#")}
    outer = [target for target in links.targets if not target.startswith("#")]
    assert inner <= links.anchors
    assert len(outer) == 8  # two figures for each of three tasks and for the mean of two
    assert all(target.startswith("data:image/svg+xml;base64,") for target in outer)
    assert not re.search(r"url\(|@import|<script src|<link|https?://", page)


def test_the_page_holds_the_figures_that_lie_beside_it(folder: Path, page: str) -> None:
    inside = {
        base64.b64decode(target.partition(",")[2])
        for target in Links(page).targets
        if target.startswith("data:")
    }
    assert inside == {path.read_bytes() for path in folder.glob("figures/*.svg")}
    assert {path.stem for path in folder.glob("figures/*.svg")} == {
        path.stem for path in folder.glob("figures/*.png")
    }


def test_the_page_counts_cells_and_shows_why_some_failed(page: str) -> None:
    text = plain(page)
    assert "53 cells: 51 ok, 1 failed , 1 missing ." in text
    assert "ValueError: &lt;b&gt;bad&lt;/b&gt;" in text
    assert "Traceback of it" in text
    assert "Reference calibration: mismatched" in text
    assert "torch 2.9.0" in text


def test_the_best_calibration_stands_with_its_difference(page: str) -> None:
    text = plain(page)
    assert re.search(
        r"tiny wanda 50 % self-generated [\d.]+ ± [\d.]+ −[\d.]+ % \(−[\d.]+ to [−+][\d.]+\)", text
    )
    assert "(one pair: no interval)" in text


def test_the_table_has_every_row_of_the_input(folder: Path, table: pd.DataFrame) -> None:
    written = pd.read_csv(folder / "table.csv")
    assert len(written) == len(table)
    assert written["value"].to_list() == pytest.approx(table["value"].to_list(), nan_ok=True)


def test_equal_tables_give_equal_folders(table: pd.DataFrame, tmp_path: Path) -> None:
    part = table[table["task"].isna() | (table["task"] == "heldout")]
    first, again = (
        {path.relative_to(page.parent): path.read_bytes() for path in page.parent.rglob("*.*")}
        for page in (write_report(part, tmp_path / name, "mismatched") for name in ("one", "two"))
    )
    assert len(first) == 6  # page, table, and two figures in two formats
    assert first == again


def test_a_grid_in_which_all_failed_has_a_page_too(make_table: MakeTable, tmp_path: Path) -> None:
    lost = {"status": "failed", "error": "OSError: gone", "task": None, "metric": None}
    table = make_table([lost])
    assert chosen_reference(table, None) is None
    text = plain(write_report(table, tmp_path, None).read_text(encoding="utf-8"))
    assert "No calibrated pruner has a result yet" in text
    assert "OSError: gone" in text


def test_a_metric_that_the_reference_lacks_is_shown_uncompared(
    make_table: MakeTable, tmp_path: Path
) -> None:
    rows = [
        {"calibration": "corpus", "value": 0.5},
        {"calibration": "other", "value": 0.6},
        {"calibration": "other", "value": 9.0, "task": "heldout", "metric": "perplexity"},
        {**DENSE, "value": 0.9},
    ]
    text = plain(write_report(make_table(rows), tmp_path, "corpus").read_text(encoding="utf-8"))
    assert "+10.0 points (one pair: no interval)" in text
    assert "tiny wanda 50 % 9.00 1" in text


def test_lost_cells_stand_where_their_number_would(page: str) -> None:
    text = plain(page)
    assert re.search(r"wanda 70 % [\d.]+ ± [\d.]+, 1 failed", text) or ", 1 failed" in text
    assert ", 1 missing" in text


def test_any_cell_of_the_page_has_its_lineage_once(table: pd.DataFrame, page: str) -> None:
    found = re.search(r'id="lineage-data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    document = json.loads(found.group(1))
    asked = {cell for ids in re.findall(r'data-cells="([^"]*)"', page) for cell in ids.split(" ")}
    assert asked == set(document["cells"]) == set(table["cell"])

    def whole(value: Any) -> Any:
        if isinstance(value, dict) and set(value) == {"$spec"}:
            return whole(document["specs"][value["$spec"]])
        if isinstance(value, dict):
            return {name: whole(each) for name, each in value.items()}
        return [whole(each) for each in value] if isinstance(value, list) else value

    for row in table.drop_duplicates("cell").to_dict("records"):
        spec = document["cells"][row["cell"]]["spec"]
        assert whole({"$spec": spec}) == json.loads(str(row["lineage"]))
    pretrained = [spec for spec in document["specs"] if spec["kind"] == "pretrain"]
    assert len(pretrained) == 1


def test_a_task_with_a_limit_of_questions_says_so(make_table: MakeTable, tmp_path: Path) -> None:
    rows = [
        {"task": task, "seed": seed, "value": 0.5, "limit": limit}
        for task, limit in (("questions", 40), ("whole", None))
        for seed in (0, 1)
    ]
    write_report(make_table(rows), tmp_path, None)
    text = plain((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert "questions: acc (%), higher is better, first 40 questions only" in text
    assert "mean of 2 tasks: acc (%), higher is better, first 40 questions only" in text
    assert "whole: acc (%), higher is better, first" not in text


def test_calibrations_without_a_seed_in_common_are_shown_uncompared(
    make_table: MakeTable, tmp_path: Path
) -> None:
    rows = [{"value": 0.5}, {"calibration": "other", "value": 0.6, "seed": 1}]
    text = plain(write_report(make_table(rows), tmp_path, "corpus").read_text(encoding="utf-8"))
    assert "no seed in common" in text
    assert " is ahead of " not in text
    assert not list(tmp_path.glob("figures/*difference*"))


def test_a_page_of_the_same_table_is_left_as_it_is(make_table: MakeTable, tmp_path: Path) -> None:
    def rows(value: float) -> list[dict[str, Any]]:
        seeds = [{"seed": seed, "value": 0.5 + 0.1 * seed} for seed in (0, 1)]
        return [*seeds, {**DENSE, "value": value}]

    page = write_report(make_table(rows(0.9)), tmp_path / "report", "corpus")
    first, made = page.read_text(encoding="utf-8"), page.stat().st_mtime_ns
    assert write_report(make_table(rows(0.9)), tmp_path / "report", "corpus") == page
    assert page.stat().st_mtime_ns == made
    write_report(make_table(rows(0.9)), tmp_path / "report", "corpus", "A note.")
    noted = page.read_text(encoding="utf-8")
    assert "A note." in noted
    write_report(make_table(rows(0.8)), tmp_path / "report", "corpus", "A note.")
    assert len({first, noted, page.read_text(encoding="utf-8")}) == 3
