import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.load import Continuation, Texts
from analysis.metrics import short_heading
from analysis.report import chosen_reference, write_report
from tests.analysis.conftest import DENSE, MakeTable, many_models


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


def data_of(page: str) -> Any:
    """Return what the page's script reads."""
    found = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(gzip.decompress(base64.b64decode(found.group(1))))


def test_the_page_refers_to_nothing_outside_itself(page: str) -> None:
    links = Links(page)
    assert {target[:1] for target in links.targets} == {"#"}
    assert {target[1:] for target in links.targets} <= links.anchors
    assert not re.search(r"url\(|@import|<script src|<link|https?://", page)


def test_the_page_holds_the_figures_that_lie_beside_it(folder: Path, page: str) -> None:
    inside = data_of(page)["pictures"]
    assert len(inside) == 8  # two figures for each of three tasks and for the mean of two
    assert re.findall(r'data-picture="(\d+)"', page) == [str(place) for place in range(8)]
    files = {path.read_text(encoding="utf-8") for path in folder.glob("figures/*.svg")}
    assert set(inside) == files
    assert {path.stem for path in folder.glob("figures/*.svg")} == {
        path.stem for path in folder.glob("figures/*.png")
    }


def test_a_figure_that_is_not_drawn_yet_keeps_its_place(page: str) -> None:
    places = re.findall(r'<img loading="lazy" width="(\d+)" height="(\d+)"', page)
    pictures = data_of(page)["pictures"]
    assert len(places) == len(pictures)
    for place, picture in zip(places, pictures, strict=True):
        found = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', picture)
        assert found is not None
        pixels = [float(points) * 96 / 72 for points in found.groups()]
        assert [float(each) for each in place] == pytest.approx(pixels, abs=0.5)


def test_the_page_counts_cells_and_shows_why_some_failed(page: str) -> None:
    text = plain(page)
    assert "53 cells: 51 ok, 1 failed , 1 missing ." in text
    assert "ValueError: &lt;b&gt;bad&lt;/b&gt;" in text
    assert data_of(page)["tracebacks"] == ["Traceback of it"]
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


def test_any_cell_of_the_page_has_its_numbers_and_its_lineage_once(
    table: pd.DataFrame, page: str
) -> None:
    document = data_of(page)
    cells = {cell["id"]: cell for cell in document["cells"]}
    asked = {int(n) for ids in re.findall(r'data-cells="([^"]*)"', page) for n in ids.split(" ")}
    assert asked == set(range(len(document["cells"])))
    assert set(cells) == set(table["cell"])

    def whole(value: Any) -> Any:
        if isinstance(value, dict) and set(value) == {"$spec"}:
            return whole(document["specs"][value["$spec"]])
        if isinstance(value, dict):
            return {name: whole(each) for name, each in value.items()}
        return [whole(each) for each in value] if isinstance(value, list) else value

    for row in table.drop_duplicates("cell").to_dict("records"):
        spec = cells[row["cell"]]["spec"]
        assert whole({"$spec": spec}) == json.loads(str(row["lineage"]))
    pretrained = [spec for spec in document["specs"] if spec["kind"] == "pretrain"]
    assert len(pretrained) == 1
    assert document["metrics"] == ["heldout: perplexity", "colours: acc (%)", "rivers: acc (%)"]
    assert document["cells"][document["dense"]["tiny"]]["method"] == "dense"
    for row in table[table["value"].notna()].to_dict("records"):
        held = {
            document["metrics"][place]: value for place, value, _ in cells[row["cell"]]["numbers"]
        }
        shown = f"{row['value']:.2f}" if row["task"] == "heldout" else f"{100 * row['value']:.1f}"
        assert held[short_heading(row["task"], row["metric"])] == shown


def test_a_long_table_is_in_the_data_and_its_first_rows_are_on_the_page(
    make_table: MakeTable, tmp_path: Path
) -> None:
    page = write_report(make_table(many_models(60)), tmp_path, "corpus").read_text("utf-8")
    best, levels, *_ = data_of(page)["tables"]
    assert (len(best), len(levels)) == (60, 120)  # every model once, and its dense one
    assert page.count("The first 50 of 120 rows") == 1
    assert [row[0][0] for row in best] == [f"model-{number:03}" for number in range(60)]
    last = levels[-1]  # model, pruner, target, no data, corpus, other, n
    assert [field[0] for field in last] == ["model-059", "wanda", "50 %", "", "55.9", "55.9", "1"]
    cells = data_of(page)["cells"]
    assert cells[last[4][3][0]]["model"] == "model-059"
    assert cells[last[4][3][0]]["source"] == "corpus"


def test_a_report_has_a_limit_of_figures_and_says_what_it_leaves_out(
    make_table: MakeTable, tmp_path: Path
) -> None:
    page = write_report(make_table(many_models(60)), tmp_path, "corpus").read_text("utf-8")
    assert data_of(page)["pictures"] == []
    assert "120 figures are left out: a report has at most 40" in plain(page)


def test_the_answer_says_what_to_take_how_sure_and_at_which_cost(
    make_table: MakeTable, tmp_path: Path
) -> None:
    rows = [
        {
            "calibration": source,
            "seed": seed,
            "task": "prose",
            "metric": "bits_per_byte",
            "value": level + 0.01 * seed * level,
            "seconds_generate": made,
            "seconds_score": 30.0,
            "seconds_prune": 12.0,
        }
        for source, level, made in (("own", 1.1, 210.0), ("corpus", 1.3, 0.0))
        for seed in (0, 1)
    ]
    text = plain(write_report(make_table(rows), tmp_path, "corpus").read_text("utf-8"))
    assert "Take own Expect averaged over 1 text and 2 settings it leaves 1.106 bits" in text
    assert "How sure 0.201 less than corpus, the next best" in text
    assert "Cost 4 min to generate and score the calibration data, 12 s for each pruning" in text


def test_a_grid_without_an_answer_says_what_it_takes(page: str) -> None:
    assert "No calibration is recommended" in plain(page)


def test_texts_stand_on_the_page(make_table: MakeTable, tmp_path: Path) -> None:
    written = (Continuation("dense", "Once there was"), Continuation("wanda", "Once <b>the"))
    texts = Texts("Once", written)
    page = write_report(make_table([{}]), tmp_path, None, texts=texts).read_text("utf-8")
    assert "<h3>wanda</h3><blockquote>Once &lt;b&gt;the</blockquote>" in page
    assert "One continuation of “Once”" in plain(page)


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
