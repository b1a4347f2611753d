"""The search for the best calibration set, on costs whose best set is known."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.bound import Placed, divergence, exchange, share_of_gain, table_of
from tests.pipeline.pruning.test_prune import CONFIGS
from tests.pipeline.tiny_models import random_model, windows

WORTH = np.random.default_rng(3).permutation(60)


def cost(indices: "np.ndarray[Any, Any]") -> float:
    assert len(set(indices.tolist())) == 20  # no window twice
    return float(WORTH[indices].sum())


def test_exchanges_come_to_the_best_set_and_never_to_a_worse_one() -> None:
    start = np.arange(20)
    reached = [cost(exchange(cost, start, 60, steps)) for steps in (1, 30, 300, 6000)]
    assert reached == sorted(reached, reverse=True)
    assert reached[0] <= cost(start)
    assert reached[-1] == sum(range(20))


def test_the_same_seed_finds_the_same_set() -> None:
    one, other = (exchange(cost, np.arange(20), 60, 50, seed=1) for _ in range(2))
    assert one.tolist() == other.tolist()


def test_a_share_is_between_the_worst_set_and_what_was_found() -> None:
    sets = {"bad": (3.0, 2.0), "own": (2.0, 1.9), "random": (2.5, 1.5), "found": (1.0, 1.0)}
    assert share_of_gain(sets, "own", 0) == pytest.approx(0.5)
    assert share_of_gain(sets, "own", 1) == pytest.approx(0.1)
    assert share_of_gain(sets, "bad", 0) == 0
    assert share_of_gain(sets, "found", 1) == 1
    table = table_of([Placed("m", sets)])
    assert table.row_count == 4


def test_the_divergence_is_kullback_and_leiblers() -> None:
    data, dense, other = windows(5), random_model(CONFIGS["llama"]), random_model(CONFIGS["neox"])

    def log_probabilities(model: Any, batch: Tensor) -> Tensor:
        with torch.no_grad():
            return functional.log_softmax(model(batch).logits.double(), dim=-1)

    batches = [log_probabilities(dense, batch).float() for batch in data.split(2)]  # type: ignore[no-untyped-call]
    one, two = log_probabilities(dense, data), log_probabilities(other, data)
    expected = float((one.exp() * (one - two)).sum(dim=-1).mean())
    assert divergence(batches, other, data) == pytest.approx(expected, rel=1e-4)
    assert divergence(batches, dense, data) == pytest.approx(0.0, abs=1e-6)
