import io
import logging
import re
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from rich.console import Console

from cluster.board import Board, Position
from cluster.graph import Stage
from cluster.store import Failure, Manifest, Store
from jobs.forecast import Room
from jobs.grid import Grid
from jobs.plan import make_plan
from jobs.progress import Busy, Progress, duration, progress_of, recall
from jobs.show import print_state
from jobs.watch import Watch


def stage(kind: str, pool: str | None = None, key: str = "k") -> Stage:
    return Stage(key=key, kind=kind, label=kind, spec={}, payload="", inputs=(), pool=pool)


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


FAILURE = Failure(key="k", kind="k", error="ValueError: odd", traceback="", finished=0.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_the_log_has_samples_and_tokens_a_second_since_generation_began(
    caplog: pytest.LogCaptureFixture, clock: list[float], local_ray: None
) -> None:
    totals = {"pretrain": 1, "generate shard": 2, "generate": 1}
    watch = Watch(Progress(totals, samples=64), "grid")
    shard, join = stage("generate", "pool"), stage("generate")
    with caplog.at_level(logging.INFO):
        for at, each, made in (
            (150.0, stage("pretrain"), manifest(50.0, tokens=9)),
            (160.0, shard, manifest(8.0, samples=32, tokens_generated=4000)),
            (172.0, shard, manifest(20.0, samples=32, tokens_generated=6000)),
            (173.0, join, manifest(1.0, samples=64, tokens_generated=10000)),
        ):
            clock[0] = at
            watch.ended(each, made)
    assert [record.message for record in caplog.records] == [
        "[1/4] pretrain: 50.0 s (at 50 s)",
        "[2/4] generate: 8.0 s (at 60 s; 32 samples, 500 tokens/s)",
        "[3/4] generate: 20.0 s (at 72 s; 64 samples, 500 tokens/s)",
        "[4/4] generate: 1.0 s (at 73 s)",
    ]


def test_time_left_is_the_estimates_scaled_by_the_measurements(clock: list[float]) -> None:
    """Stages are estimated at 10 s each and take 20; at the last look, a second ago, four were
    left."""
    stages = {str(number): stage("prune", "pool", key=str(number)) for number in range(6)}
    stages = {key: replace(each, seconds=10.0) for key, each in stages.items()}
    progress = Progress({"prune": 6}, stages=stages)
    progress.look({}, Room(2))
    assert progress.seconds_left() is None
    for key in ("0", "1"):
        progress.start(stages[key])
        clock[0] += 20.0
        progress.end(stages[key], manifest(20.0))
    progress.look({}, Room(2))
    clock[0] += 1.0
    assert progress.seconds_left() == pytest.approx(2 * 20.0 - 1.0, rel=0.05)


def test_a_repeated_stage_is_in_flight_only_once(clock: list[float]) -> None:
    progress = Progress({"prune": 2})
    for _ in range(2):
        progress.start(stage("prune", "pool", key="a"))
    progress.start(stage("prune", "pool", key="b"))
    assert progress.lines["prune"].in_flight == 2
    progress.end(stage("prune", "pool", key="a"), FAILURE)
    assert progress.lines["prune"].in_flight == 1


def test_a_summary_and_a_view_have_all_figures(clock: list[float]) -> None:
    shards = [
        Stage(
            key=f"shard-{number}",
            kind="generate",
            label=f"generate own shard {number}",
            spec={},
            payload="",
            inputs=(),
            pool="pool",
            seconds=10.0,
        )
        for number in range(5)
    ]
    pruning = replace(stage("prune", "pool"), inputs=("shard-4",))
    stages = {each.key: each for each in (*shards, pruning)}
    progress = Progress({"generate shard": 5, "prune": 2}, samples=5000, stages=stages)
    for shard in shards[:4]:
        progress.start(shard)
    clock[0] += 50.0
    progress.replicas = {"generate": 8}
    progress.end(shards[0], manifest(20.0, samples=64, tokens_generated=40_000))
    other = stage("prune", "pool", key="failed")
    progress.start(other)
    progress.end(other, FAILURE)
    positions = {
        "shard-1": Position(3.0, "loading the model", 3.0),
        "shard-2": Position(15.0, "", 12.0, 1200, 4000, "tokens"),
        "gone": Position(99.0),
    }
    progress.look(positions, Room(2))
    busy = Busy(cpus=12, all_cpus=16, gpus=3.5, all_gpus=4)
    lines = list(progress.summary(busy))
    assert re.sub(r"about \d+ s", "about N s", lines[0]) == (
        "2/7 stages in 50 s; 1 failed; generate shard 1/5; 64 of 5,000 samples; 2,000 tokens/s; "
        "replicas: generate 8; busy: CPUs 12/16, GPUs 3.5/4; about N s left"
    )
    assert lines[1:] == [
        "at work: generate own shard 2: 1,200 of 4,000 tokens, 15 s",
        "at work: generate own shard 1: loading the model, 3 s",
        "waiting for room or a worker: generate shard 2; for other stages: prune 1",
    ]
    screen = io.StringIO()
    Console(file=screen, width=200).print(progress.view(busy))
    rows = [re.findall(r"[\w. -]+", line) for line in screen.getvalue().splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert ["generate shard", "1", "0", "2", "4", "20.0", "8"] in cells
    assert "prune: ValueError: odd (failed)" in screen.getvalue()
    for line in lines[1:]:
        assert line in screen.getvalue()


def test_only_the_eight_oldest_of_many_stages_at_work_are_named(clock: list[float]) -> None:
    stages = {str(number): stage("prune", "pool", key=str(number)) for number in range(128)}
    progress = Progress({"prune": 128}, stages=stages)
    for each in stages.values():
        progress.start(each)
    progress.look({key: Position(float(key)) for key in stages}, Room(128))
    lines = list(progress.doing())
    assert lines == [f"at work: prune: {duration(127 - n)}" for n in range(8)] + [
        "at work: and 120 more"
    ]


def test_the_log_names_begun_stages_and_every_half_minute_what_workers_do(
    local_ray: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.watch.LOOK_SECONDS", 0.2)
    monkeypatch.setattr("jobs.watch.SUMMARY_SECONDS", 0.8)
    stages = {key: replace(stage("prune", "pool", key=key), label=f"prune {key}") for key in "abc"}
    board = Board()
    board.start("a")("", 12, 30, "layers")
    board.start("b")("starting vLLM", 0, 0, "")
    while len(board.read()) < 2:  # its actor takes seconds to start
        time.sleep(0.1)
    with (
        caplog.at_level(logging.INFO),
        Watch(Progress({"prune": 3}, stages=stages), "grid", board) as watch,
    ):
        for each in stages.values():
            watch.started(each)
        deadline = time.monotonic() + 30
        while "waiting" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.1)
    board.close()
    logged = [re.sub(r"\d+ s\b", "N s", record.message) for record in caplog.records]
    began = ["began: prune a (12 of 30 layers, N s)", "began: prune b (starting vLLM, N s)"]
    assert sorted(logged[:2]) == began
    assert logged.count(began[0]) == 1
    summary = logged.index("waiting for room or a worker: prune 1")
    assert logged[summary - 2 : summary] == [
        "at work: prune a: 12 of 30 layers, N s",
        "at work: prune b: starting vLLM, N s",
    ]


def test_the_size_of_the_figures_does_not_grow_with_the_number_of_stages(
    clock: list[float],
) -> None:
    progress = Progress({"prune": 10_000})
    for number in range(10_000):
        each = stage("prune", "pool", key=str(number))
        progress.start(each)
        progress.end(each, FAILURE if number % 2 else manifest(1.0))
    assert progress.ended == 10_000
    assert not progress.in_flight
    assert len(progress.errors) == 5


def test_samples_to_make_are_those_of_the_missing_shards(
    content: dict[str, Any], load: Callable[[dict[str, Any]], Grid]
) -> None:
    """Two seeds of 80 samples in shards of 64; one shard of 16 exists already."""
    plan = make_plan(load(content))
    last = next(
        key for key, each in plan.graph.items() if each.label == "generate own seed 1 shard 2 of 2"
    )
    progress = progress_of(plan, [key for key in plan.graph if key != last])
    assert progress.samples_to_make == 2 * 80 - 16
    assert progress.lines["generate shard"].total == 3
    assert progress.lines["generate"].total == 2


def test_a_resumed_run_knows_the_seconds_of_earlier_stages(
    tmp_path: Path, content: dict[str, Any], load: Callable[[dict[str, Any]], Grid]
) -> None:
    store, plan = Store(str(tmp_path / "store")), make_plan(load(content))
    windows = [key for key, each in plan.graph.items() if each.kind == "windows"]
    made, missing = windows[:1], windows[1:]
    seconds = 7 * plan.graph[made[0]].seconds
    store.write(f"manifests/{made[0]}.json", manifest(seconds).model_dump_json().encode())
    progress = progress_of(plan, missing)
    recall(progress, plan, store, made)
    progress.look({}, Room(1))
    expected = 7 * sum(plan.graph[key].seconds for key in missing)
    assert progress.seconds_left() == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(4.4, "4 s"), (720, "12 min"), (12_000, "3 h 20 min"), (187_200, "2 d 4 h")],
)
def test_durations_are_printed_in_suitable_units(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_the_state_of_stages_is_read_from_the_store_alone(
    tmp_path: Path, content: dict[str, Any], load: Callable[[dict[str, Any]], Grid]
) -> None:
    store, plan = Store(str(tmp_path / "store")), make_plan(load(content))
    windows = [key for key in plan.graph if key.startswith("windows-")]
    store.write(f"manifests/{windows[0]}.json", b"{}")
    store.write(f"leases/{windows[1]}.json", b"{}")
    store.record_failure(FAILURE.model_copy(update={"key": windows[2]}))
    store.record_failure(FAILURE.model_copy(update={"key": windows[0]}))  # and done since
    store.write("manifests/windows-of-another-grid.json", b"{}")
    screen = io.StringIO()
    print_state(plan, store, Console(file=screen, width=120))
    line = next(line for line in screen.getvalue().splitlines() if "windows" in line)
    assert re.findall(r"\d+", line) == ["1", "1", "1", str(len(windows) - 3)]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_terminal_the_figures_stay_below_the_lines_of_the_log(
    local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    handler = logging.StreamHandler(screen)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    monkeypatch.setattr(logging.getLogger(), "level", logging.INFO)
    with Watch(Progress({"prune": 2}), "grid") as watch:
        watch.started(stage("prune", "pool"))
        watch.ended(stage("prune", "pool"), manifest(2.0))
        watch.look()
        time.sleep(0.6)  # it is drawn four times a second
        logging.getLogger("jobs").info("a line")
    assert handler.stream is screen
    text = screen.getvalue()
    assert "seconds each" in text
    assert "busy: CPUs 0/2" in text
    drawn_again = text[text.index("a line") :]
    assert "seconds each" in drawn_again


def test_the_figures_are_metrics_of_ray(local_ray: None) -> None:
    board = Board()
    watch = Watch(Progress({"generate shard": 3}, samples=96), "metrics-grid", board)
    shard, other = stage("generate", "pool"), stage("generate", "pool", key="other")
    watch.started(other)
    board.start("other")("", 30, 40, "tokens")
    while not board.read():
        time.sleep(0.1)
    watch.started(shard)
    watch.ended(shard, manifest(1.0, samples=32, tokens_generated=4000))
    watch.replicas({"generate": 2})
    watch.look()
    assert watch.busy is not None
    assert watch.busy.all_cpus == 2
    (node,) = ray.nodes()
    page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {
        'ray_calprune_stages_ended_total.*outcome="made".*stage="generate shard"': 1.0,
        "ray_calprune_samples_generated_total": 32.0,
        "ray_calprune_tokens_generated_total": 4000.0,
        'ray_calprune_replicas.*stage="generate"': 2.0,
        'ray_calprune_stages_left.*stage="generate shard"': 2.0,
        'ray_calprune_stages_at_work.*stage="generate shard"': 1.0,
        'ray_calprune_share_done.*stage="generate shard"': 0.75,
        'ray_calprune_work_total.*stage="generate shard".*unit="tokens"': 30.0,
    }
    deadline = time.monotonic() + 40
    found: dict[str, float] = {}
    while found != wanted and time.monotonic() < deadline:
        time.sleep(1)
        text = urllib.request.urlopen(page, timeout=10).read().decode()
        lines = [line for line in text.splitlines() if "metrics-grid" in line]
        found = {
            pattern: float(line.split()[-1])
            for pattern in wanted
            for line in lines
            if re.search(pattern, line)
        }
    board.close()
    assert found == wanted
