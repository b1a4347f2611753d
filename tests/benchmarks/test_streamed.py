from pathlib import Path

import numpy as np

from benchmarks.streamed import compare
from pipeline.evaluation.perplexity import ScoredWindow
from tests.pipeline.tiny_models import tiny_llama


def test_both_ways_are_timed_on_the_same_losses(tmp_path: Path) -> None:
    tiny_llama(96).save_pretrained(tmp_path)
    draws = np.random.default_rng(0)
    windows = [ScoredWindow(draws.integers(1, 96, 32), 1, 0, 0) for _ in range(3)]
    found = {target.what: target for target in compare(tmp_path, windows, rounds=1)}
    assert found["losses: difference, in millionths"].met
    assert found["by layer: times in memory, CPU"].reached > 0
