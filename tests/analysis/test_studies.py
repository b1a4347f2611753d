"""Every study must find a planted effect with its sign and size, and claim nothing of noise."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from analysis.__main__ import app
from analysis.load import TableError
from analysis.studies import STUDIES, predictor
from analysis.study import Answer, Results, run_study, write_page
from jobs.cells import Cell
from tests.analysis.conftest import MakeTable, Row
from tests.analysis.from_grid import run_planted
from tests.analysis.planted import CASES, DECLARED, Effect, planted


@pytest.fixture
def answered(make_table: MakeTable) -> Callable[[str, Effect], Answer]:
    def answer(name: str, effect: Effect) -> Answer:
        return STUDIES[name].answer(Results(make_table(planted(CASES[name][0](), effect))))

    return answer


@pytest.mark.parametrize("name", CASES)
def test_a_planted_effect_is_found_with_its_sign_and_size(
    name: str, answered: Callable[[str, Effect], Answer]
) -> None:
    _, effect, expected, _ = CASES[name]
    answer = answered(name, effect)
    assert re.search(expected, answer.finding), answer.finding
    assert len(answer.numbers) > 0


@pytest.mark.parametrize("name", CASES)
def test_of_noise_alone_nothing_is_claimed(
    name: str, answered: Callable[[str, Effect], Answer]
) -> None:
    finding = answered(name, lambda cell: 0.0).finding
    assert CASES[name][3] in finding
    assert not re.search(CASES[name][2], finding)


@pytest.mark.parametrize("name", DECLARED)
def test_a_declared_study_finds_what_is_planted_in_its_own_grid(name: str, tmp_path: Path) -> None:
    effect, expected, of_noise = DECLARED[name]
    answer = STUDIES[name].answer(run_planted(STUDIES[name], tmp_path / "planted", effect))
    assert re.search(expected, answer.finding), answer.finding
    assert {"what", "verdict", "effect", "low", "high", "level_dense"} <= set(answer.numbers)
    noise = run_planted(STUDIES[name], tmp_path / "noise", lambda cell, task: 0.0)
    finding = STUDIES[name].answer(noise).finding
    assert finding.startswith(of_noise)
    assert "Worse" not in finding
    assert "Better" not in finding


def test_a_declared_study_without_its_design_says_so(tmp_path: Path) -> None:
    results = run_planted(STUDIES["filter"], tmp_path, lambda cell, task: 0.0)
    with pytest.raises(TableError, match="its design is not in the store"):
        STUDIES["filter"].answer(results._replace(design=None))


def test_an_effect_that_one_shape_reverses_is_a_difference_between_shapes(tmp_path: Path) -> None:
    def reversed_effect(cell: Cell, task: str) -> float:
        harm = -0.1 if cell.model.startswith("6-layers") else 0.1
        return harm * ((cell.prefix_tokens or 0) >= 16)

    results = run_planted(STUDIES["prefix-length"], tmp_path, reversed_effect)
    finding = STUDIES["prefix-length"].answer(results).finding
    mean = 100 * np.expm1(-(4 * 0.1 - 0.1) / 5)
    unit = re.search(r"With the shape as unit, short against long: −(\S+) % .*5 shapes", finding)
    assert unit, finding
    assert float(unit[1]) == pytest.approx(-mean, abs=0.5)
    assert "It is shown that shapes differ by more than trainings of one" in finding


def test_every_study_has_a_grid_file_of_its_name_and_a_case_here() -> None:
    assert {*CASES, *DECLARED} == set(STUDIES)
    for study in STUDIES.values():
        content = yaml.safe_load(study.grid_file.read_text())
        assert content["name"] == study.name


def test_leaving_a_domain_out_is_what_refitting_without_its_sources_gives() -> None:
    draws = np.random.default_rng(1)
    x, harm = draws.normal(size=9), draws.normal(size=(9, 1))
    holds = draws.random((9, 4)) < 0.4
    left, without, predicted = predictor.leave_domains_out(x, harm, holds)
    scaled = harm[:, 0] / harm.std()
    expected: dict[int, list[float]] = {}
    errors, plain = [], []
    for inside in holds.T:
        fitted = np.polyfit(x[~inside], scaled[~inside], 1)
        for place in np.flatnonzero(inside):
            expected.setdefault(int(place), []).append(float(np.polyval(fitted, x[place])))
        errors.append(np.mean((scaled[inside] - np.polyval(fitted, x[inside])) ** 2))
        plain.append(np.mean((scaled[inside] - scaled[~inside].mean()) ** 2))
    assert (left.item(), without.item()) == pytest.approx((np.mean(errors), np.mean(plain)))
    for place in range(9):
        assert predicted[place, 0] == pytest.approx(
            np.mean(expected.get(place, [np.nan])), nan_ok=True
        )


def test_a_score_that_only_names_the_domain_predicts_no_unseen_one() -> None:
    """Leaving one mixture out leaks: its domains are in the fit."""
    draws = np.random.default_rng(4)
    domains = np.repeat(np.arange(5), 4)
    level, score = draws.normal(size=5), draws.normal(size=5)
    x = score[domains] + draws.normal(0, 0.01, 20)
    harm = (level[domains] + draws.normal(0, 0.01, 20))[:, None]
    by_source, by_domain = np.eye(20, dtype=bool), np.eye(5, dtype=bool)[domains]
    leaking = predictor.leave_domains_out(x, harm, by_source)
    honest = predictor.leave_domains_out(x, harm, by_domain)
    assert honest[0] / honest[1] > 1.2 * leaking[0] / leaking[1]


def test_domains_are_those_of_the_corpus_or_of_the_prefixes_and_the_writing_model() -> None:
    def cell(source: Row) -> Row:
        return {"model": {"calibration": {"source": source}}}

    facts = {"kind": "testbed-corpus", "mixture": {"facts": 1, "code": 2}}
    wiki = {"kind": "file-corpus", "path": "wiki.txt"}
    both = {"kind": "corpus-mixture", "parts": {"a": {"corpus": facts}, "b": {"corpus": wiki}}}
    written = {"kind": "filter", "scores": {"samples": {"prefixes": facts}}}
    assert predictor.domains_of(cell(facts)) == {"facts", "code"}
    assert predictor.domains_of(cell(written)) == {"facts", "code", "model-written"}
    assert len(predictor.domains_of(cell(both))) == 3


def test_missing_results_are_named_with_the_command_that_makes_them(
    make_table: MakeTable, tmp_path: Path
) -> None:
    make_table([{"value": 0.5}])
    (tmp_path / "results").mkdir()
    (tmp_path / "hand.parquet").rename(tmp_path / "results" / "hand.parquet")
    result = CliRunner().invoke(app, ["study", "amount", "--store", str(tmp_path)])
    assert result.exit_code == 1
    assert f"python -m jobs run analysis/studies/amount.yaml --store {tmp_path}" in result.output


def test_the_page_has_each_contrast_of_a_design_in_a_row(tmp_path: Path) -> None:
    study = STUDIES["real-sparsity"]
    answer = study.answer(run_planted(study, tmp_path, DECLARED["real-sparsity"][0]))
    page = write_page([(study, answer)], tmp_path / "findings").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(yaml.safe_load(study.grid_file.read_text())["design"]["contrasts"])
    by_name = {row[0]: row for row in rows}
    found = by_name["Japanese against mixed, 60 %"]
    assert re.fullmatch(r"\+1[01]\.\d %", found[1])
    assert re.fullmatch(r"\+\d+\.\d to \+\d+\.\d", found[2])
    assert re.fullmatch(r"\d\.\d\d against \d\.\d\d, \d\.\d\d", found[4])
    assert found[5].startswith("worse")
    assert by_name["Japanese against mixed, 30 %"][5].startswith("equivalent")


def test_models_that_disagree_widen_the_interval_of_a_score() -> None:
    scores = np.arange(12.0)
    harm = np.column_stack([scores, -scores])
    holds = np.eye(12, dtype=bool)
    kind = predictor.PLAIN
    two, one = (
        predictor.predict(
            predictor.Sources(list("abcdefghijkl"), {"x": scores}, harm, models, kind, holds), "x"
        ).rank
        for models in ([np.array([0]), np.array([1])], [np.array([0, 1])])
    )
    assert two.effect == one.effect == pytest.approx(0)
    assert (two.low, two.high) == pytest.approx((-1, 1))
    assert (one.low, one.high) == pytest.approx((0, 0))


def test_a_paragraph_is_the_finding_in_lines_that_fit_a_page(
    answered: Callable[[str, Effect], Answer],
) -> None:
    answer = answered("predictor", CASES["predictor"][1])
    lines = answer.paragraph.splitlines()
    assert " ".join(lines) == answer.finding
    assert len(lines) > 1
    assert max(len(line) for line in lines) <= 110


def test_a_study_prints_its_finding_and_writes_its_figure_and_numbers(tmp_path: Path) -> None:
    run_planted(STUDIES["similarity"], tmp_path, DECLARED["similarity"][0])
    command = ["study", "similarity", "--store", str(tmp_path)]
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "Worse: two kinds against five with half unseen text" in result.output
    figure = (tmp_path / "out" / "similarity.svg").read_bytes()
    assert figure.startswith(b"<?xml")
    numbers = pd.read_csv(tmp_path / "out" / "similarity.csv")
    assert {"what", "effect", "low", "high", "p", "models", "unit"} <= set(numbers)


def test_a_finding_discloses_what_its_grid_notes(tmp_path: Path) -> None:
    run_planted(STUDIES["real-filter"], tmp_path, lambda cell, task: 0.0)
    finding = run_study(STUDIES["real-filter"], str(tmp_path)).finding
    assert "whose weights were 4-bit (Q4_1) and are dequantized" in finding
