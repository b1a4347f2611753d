"""Parts of the benchmarks of replicas and scheduling that a run does not show."""

from pathlib import Path

import pytest

from benchmarks.replicas import total_rate
from benchmarks.schedule import grid
from jobs.check import check_plan
from jobs.grid import load_grid
from jobs.plan import make_plan
from pipeline.specs import GenerateSpec, ShardSpec


def test_a_replicas_rate_leaves_out_its_first_shard_which_loads_the_model() -> None:
    one = "7 1000 100.0\n7 60 110.0\n7 40 120.0\n"  # 100 tokens in 20 seconds
    other = "8 9999 115.0\n8 30 118.0\n"  # 30 in 3
    assert total_rate([one], 1) == pytest.approx(5.0)
    assert total_rate([other, one], 2) == pytest.approx(15.0)


def test_a_replica_with_fewer_than_two_shards_is_an_error() -> None:
    with pytest.raises(AssertionError, match="1 of 2 replicas had work"):
        total_rate(["7 10 1.0\n7 10 2.0\n"], 2)
    with pytest.raises(AssertionError, match="one shard only"):
        total_rate(["7 10 1.0\n"], 1)


def test_the_measured_grid_has_one_sample_per_prefix(tmp_path: Path) -> None:
    plan = make_plan(load_grid(grid(tmp_path, 200, 64)))
    assert check_plan(plan) == []
    (samples,) = (spec for spec in plan.specs.values() if isinstance(spec, GenerateSpec))
    assert samples.num_samples == 200
    shards = [spec for spec in plan.specs.values() if isinstance(spec, ShardSpec)]
    assert len(shards) == 2 * 4  # of texts and of scores
