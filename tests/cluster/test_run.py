import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cluster import worker
from cluster.graph import Graph, Resources, Stage
from cluster.helpers import Helpers
from cluster.run import run_graph
from cluster.store import Failure, Manifest, Partial, Store
from cluster.watcher import Watcher
from cluster.worker import Aids, Maker, Replica, WorkerLostError, WritePosition, _make

pytestmark = pytest.mark.usefixtures("local_ray")

VERSIONS = {"calprune": "0"}
QUICK_SECONDS = 2.0


def stage(key: str, payload: str, *inputs: str, pool: str | None = None, **resources: int) -> Stage:
    return Stage(
        key=key,
        kind=key.split("-")[0],
        label=key,
        spec={},
        payload=payload,
        inputs=inputs,
        pool=pool,
        resources=Resources(**resources),
    )


def graph(*stages: Stage) -> Graph:
    return {each.key: each for each in stages}


def add(
    payload: str,
    artifacts: dict[str, Path],
    output: Path,
    cpus: int,
    partial: Partial,
    helpers: Helpers,
) -> dict[str, Any]:
    """Write its own number plus those of its inputs; some payloads are incidents."""
    word, _, argument = payload.partition(" ")
    if word == "raise":
        raise ValueError(argument)
    if word == "engine-dies-once":
        marker = Path(argument)
        if not marker.exists():
            marker.write_text(str(os.getpid()))
            raise WorkerLostError("out of memory")
        word, argument = "sleep", "0"
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if word in ("sleep", "wait-for", "signal"):
        (output / "started").write_text(str(time.time()))
        if word == "sleep":
            time.sleep(float(argument))
        elif word == "signal":
            Path(argument).touch()
        deadline = time.monotonic() + 60
        while word == "wait-for" and not Path(argument).exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        (output / "pid").write_text(str(os.getpid()))
        (output / "ended").write_text(str(time.time()))
        word = "1"
    if word == "die-once":
        marker = Path(argument)
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        word = "1"
    if word == "count":
        with Path(argument).open("a") as file:
            file.write("x")
        word = "1"
    if word == "pid":
        time.sleep(0.2)
        (output / "pid").write_text(str(os.getpid()))
        word = "1"
    total = int(word) + sum(int((folder / "n").read_text()) for folder in artifacts.values())
    (output / "n").write_text(str(total))
    return {"total": total, "cpus": cpus}


class Recorder(Watcher):
    """Keeps each stage's key and result, in the order in which stages end."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[tuple[str, str]] = []

    def ended(self, stage: Stage, result: Manifest | Failure) -> None:
        self.results.append((stage.key, "failed" if isinstance(result, Failure) else "made"))


def test_stages_run_after_their_inputs_and_leave_artifacts(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    diamond = graph(
        stage("a", "1"), stage("b", "10", "a"), stage("c", "100", "a"), stage("d", "1000", "b", "c")
    )
    outcome = run_graph(diamond, ["d"], add, store, VERSIONS)
    assert set(outcome.made) == {"a", "b", "c", "d"}
    assert (store.fetch("d") / "n").read_text() == "1112"
    manifest = store.manifest("d")
    assert manifest is not None
    assert manifest.report == {"total": 1112, "cpus": 1}
    assert manifest.versions == VERSIONS
    assert manifest.peak_memory_bytes is None or manifest.peak_memory_bytes > 1 << 20


def test_seconds_begin_after_a_process_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [50.0]
    kinds: list[str] = []
    monkeypatch.setattr("cluster.worker.time", SimpleNamespace(monotonic=lambda: clock[0]))

    @contextmanager
    def prepared(kind: str, write: WritePosition) -> Iterator[None]:
        kinds.append(kind)
        clock[0] += 100
        yield

    def execute(*given: Any) -> dict[str, Any]:
        clock[0] += 7
        return add(*given)

    store = Store(str(tmp_path / "store"))
    maker = Maker(execute, store.url, VERSIONS, "run", Aids(prepared))
    made = _make(stage("a-1", "1"), maker, store)
    assert kinds == ["a"]
    assert made.seconds == 7


def test_a_process_that_cannot_be_prepared_is_a_recorded_failure(tmp_path: Path) -> None:
    def prepared(kind: str, write: WritePosition) -> AbstractContextManager[None]:
        raise ModuleNotFoundError(f"no module for {kind}")

    store = Store(str(tmp_path / "store"))
    outcome = run_graph(
        graph(stage("a-1", "1")), ["a-1"], add, store, VERSIONS, aids=Aids(prepared)
    )
    assert outcome.failed["a-1"].error == "ModuleNotFoundError: no module for a"


def test_stages_in_the_store_are_not_made_again(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    count = tmp_path / "count"
    pair = graph(stage("a", f"count {count}"), stage("b", "1", "a"))
    run_graph(pair, ["a"], add, store, VERSIONS)
    outcome = run_graph(pair, ["b"], add, store, VERSIONS)
    assert set(outcome.made) == {"b"}
    assert count.read_text() == "x"


def claims(
    payload: str,
    artifacts: dict[str, Path],
    output: Path,
    cpus: int,
    partial: Partial,
    helpers: Helpers,
) -> dict[str, Any]:
    """Report the artifacts that runs under way claim to use."""
    uses = Path(partial.store.root, "uses").glob("*.json")
    return {"used": [key for path in uses for key in json.loads(path.read_text())]}


def test_a_run_claims_what_it_makes_and_what_it_only_reads(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    run_graph(graph(stage("copy", "1")), ["copy"], add, store, VERSIONS)
    outcome = run_graph(graph(stage("a", "1", "copy")), ["a"], claims, store, VERSIONS)
    assert set(outcome.made) == {"a"}
    manifest = store.manifest("a")
    assert manifest is not None
    assert manifest.report == {"used": ["a", "copy"]}


def test_the_stage_with_most_descendants_is_made_first(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    plan = graph(
        stage("leaf", "1"),
        stage("few", "1"),
        stage("many", "1"),
        *(stage(f"{name}-{n}", "1", name) for name, count in (("few", 1), ("many", 3))
          for n in range(count)),
    )  # fmt: skip
    watcher = Recorder()
    run_graph(plan, list(plan), add, store, VERSIONS, workers=1, watcher=watcher)
    assert [key for key, _ in watcher.results] == [
        "many",
        "few",
        "leaf",
        "few-0",
        "many-0",
        "many-1",
        "many-2",
    ]


def test_a_failure_that_cannot_be_recorded_does_not_end_the_run(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    store.write("failures", b"a file where a folder should be")
    plan = graph(stage("bad", "raise no"), stage("good", "1"))
    outcome = run_graph(plan, list(plan), add, store, VERSIONS)
    assert outcome.made == {"good"}
    assert outcome.failed["bad"].error == "ValueError: no"


def test_a_failure_is_recorded_with_its_traceback_and_the_rest_is_made(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    watcher = Recorder()
    plan = graph(
        stage("bad", "raise no such layer"),
        stage("reader", "1", "bad"),
        stage("readers-reader", "1", "reader"),
        stage("good", "1"),
    )
    outcome = run_graph(plan, ["readers-reader", "good"], add, store, VERSIONS, watcher=watcher)
    assert set(outcome.made) == {"good"}
    assert set(outcome.failed) == {"bad"}
    assert outcome.blocked == {"reader": "bad", "readers-reader": "bad"}
    failure = store.failure("bad")
    assert failure is not None
    assert failure.error == "ValueError: no such layer"
    assert "raise ValueError(argument)" in failure.traceback
    assert sorted(watcher.results) == [("bad", "failed"), ("good", "made")]


def test_only_what_failed_is_tried_again(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    count = tmp_path / "count"
    plan = graph(stage("a", f"count {count}"), stage("b", "raise once", "a"))
    run_graph(plan, ["b"], add, store, VERSIONS)
    mended = graph(plan["a"], stage("b", "5", "a"))
    outcome = run_graph(mended, ["b"], add, store, VERSIONS)
    assert set(outcome.made) == {"b"}
    assert count.read_text() == "x"
    assert store.failure("b") is None


@pytest.mark.parametrize("pool", [None, "pool"])
def test_a_killed_worker_costs_only_its_stage(tmp_path: Path, pool: str | None) -> None:
    store = Store(str(tmp_path / "store"))
    plan = graph(
        stage("a", "1", pool=pool),
        stage("b", f"die-once {tmp_path / 'died'}", "a", pool=pool),
        stage("c", "1", "b", pool=pool),
    )
    outcome = run_graph(plan, ["c"], add, store, VERSIONS)
    assert set(outcome.made) == {"a", "b", "c"}
    assert (tmp_path / "died").exists()
    assert outcome.failed == {}


def test_a_worker_that_always_dies_is_a_failure_and_not_a_hang(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    missing = tmp_path / "no-folder" / "died"
    doomed = Stage(
        key="doomed",
        kind="k",
        label="doomed",
        spec={},
        payload=f"die-once {missing}",
        inputs=(),
        resources=Resources(retries=0),
    )
    outcome = run_graph(graph(doomed), ["doomed"], _kill_oneself, store, VERSIONS)
    assert set(outcome.failed) == {"doomed"}
    assert store.failure("doomed") is not None


def _kill_oneself(
    payload: str,
    artifacts: dict[str, Path],
    output: Path,
    cpus: int,
    partial: Partial,
    helpers: Helpers,
) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_an_input_found_damaged_during_the_run_is_made_again(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    plan = graph(stage("a", "1"), stage("b", "10", "a"), stage("c", "100", "a"))
    run_graph(plan, ["a"], add, store, VERSIONS)
    manifest = store.manifest("a")
    assert manifest is not None
    (tmp_path / "store" / manifest.data / "n").write_text("7")
    outcome = run_graph(plan, ["b", "c"], add, store, VERSIONS)
    assert set(outcome.made) == {"a", "b", "c"}
    assert outcome.failed == {}
    fresh = Store(store.url)
    assert (fresh.fetch("b") / "n").read_text() == "11"
    assert (fresh.fetch("c") / "n").read_text() == "101"


def test_a_pool_serves_many_stages_with_few_processes(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    shards = [stage(f"shard-{number}", "pid", pool="generate") for number in range(6)]
    joined = stage("joined", "0", *(shard.key for shard in shards))
    run_graph(graph(*shards, joined), ["joined"], add, store, VERSIONS)
    assert (store.fetch("joined") / "n").read_text() == "6"
    pids = {(store.fetch(shard.key) / "pid").read_text() for shard in shards}
    assert 1 <= len(pids) <= 2


def test_one_worker_and_two_leave_the_same_files(tmp_path: Path) -> None:
    plan = graph(
        stage("a", "1"),
        *(stage(f"shard-{number}", str(number), "a", pool="p") for number in range(4)),
        stage("z", "0", *(f"shard-{number}" for number in range(4))),
    )
    sums = []
    for workers in (1, 2):
        store = Store(str(tmp_path / str(workers)))
        run_graph(plan, ["z"], add, store, VERSIONS, workers=workers)
        manifests = [store.manifest(key) for key in plan]
        sums.append([each.files for each in manifests if each is not None])
    assert sums[0] == sums[1]
    assert len(sums[0]) == len(plan)


# --------------------------------------------------------------------------------------- replicas


def noted(store: Store, key: str, name: str) -> float:
    return float((store.fetch(key) / name).read_text())


@pytest.mark.parametrize("count", [1, 2])
def test_a_pool_has_no_more_replicas_than_its_maximum(tmp_path: Path, count: int) -> None:
    store = Store(str(tmp_path / "store"))
    shards = graph(*(stage(f"s-{n}", "sleep 0.3", pool="p", max_replicas=count) for n in range(6)))
    run_graph(shards, list(shards), add, store, VERSIONS)
    assert len({noted(store, key, "pid") for key in shards}) == count


def test_a_replica_starts_when_the_cluster_has_room_and_ends_when_it_has_no_work(
    tmp_path: Path,
) -> None:
    """On two CPUs. While `other` has one, `signal` takes the other from the pool's actor. `late-0`
    and `late-1` have both. `last` gets one of them while `long` has the other."""
    store = Store(str(tmp_path / "store"))
    early, both, ended = (tmp_path / name for name in ("early", "both", "ended"))
    plan = graph(
        stage("other", f"wait-for {early}"),
        # Ready with `other`, which so has its CPU before the pool asks for one.
        stage("begin", "1"),
        *(stage(f"early-{n}", "sleep 0.2", "begin", pool="p") for n in range(3)),
        stage("signal", f"signal {early}", *(f"early-{n}" for n in range(3))),
        stage("late-0", f"wait-for {both}", "other", pool="p"),
        stage("late-1", f"signal {both}", "other", pool="p"),
        stage("long", f"wait-for {ended}", "other", pool="p"),
        stage("last", f"signal {ended}", "late-0", "late-1"),
    )
    outcome = run_graph(plan, list(plan), add, store, VERSIONS)
    assert set(outcome.made) == set(plan)
    assert len({noted(store, f"early-{n}", "pid") for n in range(3)}) == 1
    assert noted(store, "late-0", "pid") != noted(store, "late-1", "pid")
    assert noted(store, "signal", "ended") < noted(store, "other", "ended")
    assert noted(store, "last", "started") < noted(store, "long", "ended")


def test_a_pool_waits_while_other_stages_take_all_the_workers(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    plan = graph(
        stage("other", "sleep 0.5"), stage("a", "1", pool="p"), stage("b", "1", pool="p"),
        stage("third", "1"),
    )  # fmt: skip
    outcome = run_graph(plan, list(plan), add, store, VERSIONS, workers=1)
    assert set(outcome.made) == set(plan)


class QuickReplica(Replica):
    """A replica that waits at most `QUICK_SECONDS` for its first call."""

    def __init__(self) -> None:
        worker.CALL_SECONDS = QUICK_SECONDS
        super().__init__()


def test_an_actor_that_nobody_calls_frees_its_resources() -> None:
    """An actor that was killed while it was being created is left like this."""
    forgotten, called = (ray.remote(QuickReplica).options(num_cpus=0.5) for _ in range(2))
    kept = forgotten.remote(), called.remote()
    ray.get(kept[1].start.remote())
    began = time.monotonic()
    while ray.available_resources().get("CPU") != 1.5 or time.monotonic() < began + QUICK_SECONDS:
        assert time.monotonic() < began + 60, "an actor that nobody calls holds a CPU"
        time.sleep(0.1)
    ray.get(kept[1].start.remote())  # the other one still runs
    ray.kill(kept[1])


def test_a_pool_outlives_more_lost_replicas_than_one_stage_may_lose(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    bounds = {"max_replicas": 1, "retries": 1}
    shards = graph(
        *(stage(f"s-{n}", f"die-once {tmp_path / str(n)}", pool="p", **bounds) for n in range(4))
    )
    outcome = run_graph(shards, list(shards), add, store, VERSIONS)
    assert set(outcome.made) == set(shards)


def test_one_loss_of_two_actors_costs_one_try(tmp_path: Path) -> None:
    """As when a node is lost: one actor is at work, the other one is idle."""
    store = Store(str(tmp_path / "store"))
    bounds = {"max_replicas": 2, "retries": 1}
    plan = graph(*(stage(key, str(tmp_path), pool="p", **bounds) for key in "ab"))
    outcome = run_graph(plan, list(plan), _die_with_the_other, store, VERSIONS)
    assert outcome.made == {"a", "b"}
    assert list(outcome.repeated.values()) == [1]


def _die_with_the_other(
    payload: str,
    artifacts: dict[str, Path],
    output: Path,
    cpus: int,
    partial: Partial,
    helpers: Helpers,
) -> dict[str, Any]:
    """Of two stages in two processes, one ends; then the other one kills both, once."""
    folder = Path(payload)
    if (folder / "killed").exists():
        return {}
    (folder / f"{os.getpid()}.pid").touch()
    deadline = time.monotonic() + 60
    while len(both := sorted(folder.glob("*.pid"))) < 2:
        assert time.monotonic() < deadline, "the other actor did not come"
        time.sleep(0.1)
    if both[0].stem != str(os.getpid()):
        time.sleep(2.0)  # the other actor becomes idle
        (folder / "killed").touch()
        for each in both:
            os.kill(int(each.stem), signal.SIGKILL)
    return {}


def test_a_stage_that_kills_every_replica_fails_and_the_others_of_its_pool_go_on(
    tmp_path: Path,
) -> None:
    store = Store(str(tmp_path / "store"))
    bounds = {"max_replicas": 1, "retries": 1}
    plan = graph(
        stage("a", "die", pool="p", **bounds),
        stage("b", "5", pool="p", **bounds),
        stage("c", "5", pool="p", **bounds),
    )
    outcome = run_graph(plan, list(plan), add, store, VERSIONS)
    assert set(outcome.made) == {"b", "c"}
    assert set(outcome.failed) == {"a"}
    assert "Died" in outcome.failed["a"].error


@pytest.mark.parametrize("retries", [0, 1])
def test_a_dead_engines_stage_is_made_in_another_process_or_recorded(
    tmp_path: Path, retries: int
) -> None:
    store = Store(str(tmp_path / "store"))
    marker = tmp_path / "died"
    plan = graph(stage("s", f"engine-dies-once {marker}", pool="p", retries=retries))
    outcome = run_graph(plan, ["s"], add, store, VERSIONS)
    if retries:
        assert noted(store, "s", "pid") != float(marker.read_text())
    else:
        assert outcome.failed["s"].error == "WorkerLostError: out of memory"
        assert "raise WorkerLostError" in outcome.failed["s"].traceback


def test_idle_actors_make_way_for_a_stage_when_workers_are_bounded(
    tmp_path: Path,
) -> None:
    """Two pools hold both CPUs and still have ready stages when another stage needs a CPU."""
    store = Store(str(tmp_path / "store"))
    plan = graph(
        stage("first", "1"),
        stage("q-0", "1", pool="q"),
        stage("p-0", "1", pool="p"),
        stage("p-1", "sleep 4", pool="p"),  # q's actor starts meanwhile
        stage("p-2", "1", pool="p"),
        stage("q-1", "1", "p-0", pool="q"),
        stage("q-2", "1", "p-0", pool="q"),
        stage("reader", "1", "q-1"),
    )
    done: list[str] = []
    runner = threading.Thread(
        target=lambda: done.extend(
            run_graph(plan, list(plan), add, store, VERSIONS, workers=1).made
        ),
        daemon=True,
    )
    runner.start()
    runner.join(timeout=120)
    assert sorted(done) == sorted(plan)
