import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cluster import leases, run
from cluster.garbage import collect, find
from cluster.graph import Graph, Stage
from cluster.helpers import Helpers
from cluster.run import Outcome
from cluster.store import Partial, Store

OWNER = """
import sys, time
from cluster import leases
from cluster.store import Store
store = Store(sys.argv[1])
with leases.Claim(store, ["a"]) as claim:
    assert leases.acquire(store, "a", claim.run, ()) is None
    print(claim.run, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("PULSE_SECONDS", 0.05), ("LEASE_SECONDS", 0.8), ("SETTLE_SECONDS", 0.1)):
        monkeypatch.setattr(leases, name, seconds)
    monkeypatch.setattr(run, "POLL_SECONDS", 0.1)


def stage(key: str, payload: str, *inputs: str) -> Stage:
    return Stage(key=key, kind="k", label=key, spec={}, payload=payload, inputs=inputs)


def note(
    payload: str,
    artifacts: dict[str, Path],
    output: Path,
    cpus: int,
    partial: Partial,
    helpers: Helpers,
) -> dict[str, Any]:
    """Take a while, and leave a line in a file."""
    folder, _, seconds = payload.partition(" ")
    with Path(folder).open("a") as file:
        file.write(f"{output.parent.name}\n")
    time.sleep(float(seconds))
    (output / "n").write_text("1")
    return {}


def elsewhere(store: Store, name: str) -> None:
    """Record a run of another machine that no longer writes its pulse and holds the lease of
    `a`."""
    record = leases.RunRecord(run=name, host="far", machine="other", process=1, started="1")
    store.write(f"runs/{name}.json", record.model_dump_json().encode())
    store.write(f"uses/{name}.json", b'["of-the-dead"]')
    store.write(f"pulses/{name}.json", b"0")
    store.create("leases/a.json", name.encode())


def test_one_run_holds_a_lease_until_it_releases_it(store: Store) -> None:
    assert leases.acquire(store, "a", "first", ()) is None
    assert leases.acquire(store, "a", "first", ()) is None  # after a lost attempt
    assert leases.acquire(store, "a", "second", ()) == "first"
    leases.release(store, "a", "second")
    assert leases.holder(store, "a") == "first"
    leases.release(store, "a", "first")
    assert leases.acquire(store, "a", "second", ()) is None


def test_one_of_several_runs_takes_over_a_dead_runs_lease(store: Store) -> None:
    store.create("leases/a.json", b"dead")
    results: dict[str, str | None] = {}

    def take(run: str) -> None:
        results[run] = leases.acquire(store, "a", run, {"dead"})

    threads = [threading.Thread(target=take, args=(f"run-{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [run for run, other in results.items() if other is None] == [leases.holder(store, "a")]


@pytest.mark.usefixtures("quick")
def test_a_run_with_a_pulse_is_alive_even_if_its_clock_is_wrong(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock goes back by hours at every look."""
    clock = iter(range(1_900_000_000, 0, -10_000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    observer = leases.Observer(store)
    with leases.Claim(store, ["a"]) as claim:
        for _ in range(12):  # longer than a lease
            assert observer.alive(claim.run)
            time.sleep(0.1)
    assert not observer.alive(claim.run)
    elsewhere(store, "silent")
    assert observer.alive("silent")
    time.sleep(1.0)
    assert not observer.alive("silent")
    assert store.names("runs") == set()


def test_a_killed_run_on_this_machine_is_dead_at_once(store: Store) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, store.url], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    name = owner.stdout.readline().strip()
    observer = leases.Observer(store)
    assert observer.alive(name)
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    leases.sweep(store, observer)
    assert leases.holder(store, "a") is None
    assert not observer.alive(name)


@pytest.mark.usefixtures("quick")
def test_a_forgotten_record_comes_back_with_the_next_pulse(store: Store) -> None:
    with leases.Claim(store, ["a"]) as claim:
        leases.forget(store, claim.run)
        time.sleep(0.3)
        assert leases.Observer(store).alive(claim.run)


@pytest.mark.usefixtures("quick", "local_ray")
def test_two_concurrent_runs_make_no_stage_twice(store: Store, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    shared = [stage(f"s-{number}", f"{notes} 0.2") for number in range(6)]
    ends = [stage(f"end-{name}", f"{notes} 0", *(each.key for each in shared)) for name in "xy"]
    outcomes: list[Outcome] = []

    def go(*stages: Stage) -> None:
        graph: Graph = {each.key: each for each in stages}
        outcomes.append(run.run_graph(graph, [stages[-1].key], note, Store(store.url), {}))

    threads = [threading.Thread(target=go, args=(*shared, end)) for end in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert [len(outcome.made) for outcome in outcomes] == [7, 7]
    made = Counter(notes.read_text().split())
    assert made == Counter([*(each.key for each in shared), "end-x", "end-y"])
    assert store.names("leases") == store.names("runs") == store.names("pulses") == set()


@pytest.mark.usefixtures("quick", "local_ray")
def test_a_dead_runs_stage_is_made_after_its_lease_has_expired(
    store: Store, tmp_path: Path
) -> None:
    elsewhere(store, "silent")
    started = time.monotonic()
    graph = {"a": stage("a", f"{tmp_path / 'notes'} 0")}
    assert run.run_graph(graph, ["a"], note, store, {}).made == {"a"}
    assert time.monotonic() - started > leases.LEASE_SECONDS
    assert store.names("leases") == set()


@pytest.mark.usefixtures("local_ray")
def test_a_run_whose_clock_is_days_ahead_sweeps_no_stage_under_way(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = {"a": stage("a", f"{tmp_path / 'notes'} 1.5")}
    made: list[Outcome] = []
    other = threading.Thread(
        target=lambda: made.append(run.run_graph(graph, ["a"], note, store, {}))
    )
    other.start()
    while not store.attempts():
        time.sleep(0.05)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3 * 24 * 3600)
    leases.sweep(store, leases.Observer(store))
    store.sweep()
    other.join(timeout=60)
    assert made[0].made == {"a"}
    assert (tmp_path / "notes").read_text().split() == ["a"]
    assert store.damaged(["a"]) == {}


@pytest.mark.usefixtures("quick")
def test_garbage_is_what_no_grid_reaches_and_no_living_run_uses(store: Store) -> None:
    facts: dict[str, Any] = {
        "kind": "k",
        "spec": {},
        "report": {},
        "seconds": 0.0,
        "peak_memory_bytes": None,
        "versions": {},
        "host": "",
    }
    for key in ("reached", "used", "unused", "of-the-dead"):
        with store.attempt(key) as attempt:
            (attempt.folder / "file").write_bytes(bytes(1000))
            attempt.commit(**facts)
    store.write("data/reached/5-dead/half", bytes(10))
    store.write("partial/gone/5-aa-layer", bytes(10))
    store.write("data/at-work/5-now/half", bytes(10))
    elsewhere(store, "silent")
    with leases.Claim(store, ["used", "at-work"]) as claim:
        store.create("leases/at-work.json", claim.run.encode())
        found = find(store, {"reached"})
    assert found.artifacts == ["of-the-dead", "unused"]
    assert found.attempts == [f"{store.root}/data/reached/5-dead"]
    assert found.kept == ["gone"]
    assert found.bytes >= 2020
    assert store.keys() == {"reached", "used", "unused", "of-the-dead"}
    collect(store, found)
    assert store.keys() == {"reached", "used"}
    assert store.damaged(["reached", "used"]) == {}
    assert [path.rsplit("/", 2)[-2] for path in store.attempts()].count("at-work") == 1
    assert not store.kept()
