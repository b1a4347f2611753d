"""The record of pilot pruning counts what each way of choosing lost."""

import json
from pathlib import Path

import pytest

from benchmarks.pilot import Choice, choices, halves, mean_and_interval
from jobs.grid import load_grid


def test_a_loss_is_that_of_the_choice_and_a_random_one_loses_the_mean() -> None:
    losses = {"a": 0.0, "b": 0.2, "c": 0.4}
    rows = {row.way: row for row in choices(losses, {"pilot": "a", "score": "c"}, "m", "t")}
    assert rows["pilot"][3:] == (0.0, 1.0)
    assert rows["score"][3:] == (0.4, 0.0)
    assert rows["at random"][3:] == (pytest.approx(0.2), pytest.approx(1 / 3))


def test_texts_of_a_model_are_averaged_before_models_are_compared() -> None:
    rows = [
        Choice("pilot", model, text, loss, 1.0)
        for model, text, loss in (("a", "x", 0.0), ("a", "y", 0.2), ("b", "x", 0.3))
    ]
    # 10 % and 30 %: 20 % with t = 12.706 at one degree of freedom times 10 %.
    assert mean_and_interval(rows, lambda row: row.loss) == "20.0 (-107.1 to 147.1, over 2 models)"
    clipped = mean_and_interval(rows, lambda row: row.loss, (0, 100))
    assert clipped == "20.0 (0.0 to 100.0, over 2 models)"
    of_one = mean_and_interval(rows[:2], lambda row: row.loss)
    assert of_one == "10.0 (-117.1 to 137.1, over 2 texts of one model)"


def test_the_truth_is_measured_on_other_documents_than_the_probe(tmp_path: Path) -> None:
    grid = load_grid(Path("benchmarks/pilots/testbed.yaml"))
    probe, truth = halves(grid, "heldout-facts", tmp_path)
    texts = []
    for corpus in (probe, truth):
        lines = Path(corpus.path).read_text().splitlines()
        texts.append([json.loads(line)["text"] for line in lines])
    assert sum(map(len, texts[0])) > 64 * 128
    assert not set(texts[0]) & set(texts[1])
