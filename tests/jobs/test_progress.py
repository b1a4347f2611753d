import logging
import time

import pytest

from cluster.graph import Stage
from cluster.store import Manifest
from jobs.run import Watch


def stage(kind: str, pool: str | None) -> Stage:
    return Stage(key="k", kind=kind, label=kind, spec={}, payload="", inputs=(), pool=pool)


def manifest(seconds: float, **report: int) -> Manifest:
    return Manifest(
        key="k",
        kind="k",
        spec={},
        data="",
        files={},
        report=report,
        seconds=seconds,
        peak_memory_bytes=None,
        versions={},
        host="",
        finished=0.0,
    )


def test_progress_tells_samples_and_tokens_a_second_since_generation_began(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch = Watch(total=4)
    shard, join = stage("generate", "pool"), stage("generate", None)
    with caplog.at_level(logging.INFO):
        for at, each, made in (
            (150.0, stage("pretrain", None), manifest(50.0, tokens=9)),
            (160.0, shard, manifest(8.0, samples=32, tokens_generated=4000)),
            (172.0, shard, manifest(20.0, samples=32, tokens_generated=6000)),
            (173.0, join, manifest(1.0, samples=64, tokens_generated=10000)),
        ):
            now[0] = at
            watch.ended(each, made)
    assert [record.message for record in caplog.records] == [
        "[1/4] pretrain: 50.0 s (at 50 s)",
        "[2/4] generate: 8.0 s (at 60 s; 32 samples, 500 tokens/s)",
        "[3/4] generate: 20.0 s (at 72 s; 64 samples, 500 tokens/s)",
        "[4/4] generate: 1.0 s (at 73 s)",
    ]
