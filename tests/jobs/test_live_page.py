"""The page of a grid that runs, from a store."""

import dataclasses
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from queue import Queue
from typing import Any

import pytest

from cluster.store import Failure, Manifest, Store
from jobs.grid import Grid
from jobs.live_page import Page, seconds_left, serve
from jobs.plan import Plan, make_plan
from tests.jobs.test_best import plant, quality

Content = dict[str, Any]


@pytest.fixture
def plan(content: Content, load: Callable[[Content], Grid]) -> Plan:
    del content["evaluate"]["tasks"], content["evaluate"]["task_folder"]
    return make_plan(load(content))


@pytest.fixture
def store(plan: Plan, tmp_path: Any) -> Store:
    """A store with the results of half of the cells, a failure, and a stage under way."""
    store = Store(str(tmp_path / "store"))
    half = dict(list(plan.cells.items())[: len(plan.cells) // 2])
    plant(dataclasses.replace(plan, cells=half), store, quality)
    prunings = [key for key, stage in plan.graph.items() if stage.kind == "prune"]
    failure = Failure(
        key=prunings[0], kind="prune", error="no room: <b>lower</b> it", traceback="", finished=0.0
    )
    store.write(f"failures/{prunings[0]}.json", failure.model_dump_json().encode())
    store.write(f"leases/{prunings[1]}.json", b"{}")
    return store


def test_a_page_shows_what_is_made_under_way_failed_and_missing(plan: Plan, store: Store) -> None:
    state = Page(plan, store).state()
    assert state["stages"]["evaluate"]["done"] == len(plan.cells) // 2
    assert state["stages"]["prune"] == {
        "done": 0,
        "under way": 1,
        "failed": 1,
        "missing": sum(stage.kind == "prune" for stage in plan.graph.values()) - 2,
    }
    assert [each["error"] for each in state["failures"]] == ["no room: <b>lower</b> it"]
    assert len(state["at_work"]) == 1
    assert state["columns"] == ["cell", "true perplexity", "true kl"]
    assert len(state["results"]) == len(plan.cells) // 2
    assert state["results"][0][0] == "dense"
    assert state["results"][0][2] is None
    assert all(row[0].startswith("magnitude") and row[2] > 0 for row in state["results"][1:3])


def test_results_of_cells_that_end_later_are_added(
    plan: Plan, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.live_page.REFRESH_SECONDS", 0.0)
    page = Page(plan, store)
    before = page.state()["results"]
    rest = dict(list(plan.cells.items())[len(plan.cells) // 2 :])
    plant(dataclasses.replace(plan, cells=rest), store, quality)
    after = page.state()["results"]
    assert after[: len(before)] == before
    assert len({row[0] for row in after}) == len(after) == len(plan.cells)


def test_looks_at_the_store_are_rare_however_many_browsers_ask(
    plan: Plan, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Page(plan, store)
    looks = []
    monkeypatch.setattr(page, "_look", lambda now: looks.append(now) or {})
    for _ in range(5):
        page.state()
    assert len(looks) == 1


def made(key: str, seconds: float, finished: float) -> Manifest:
    facts: dict[str, Any] = {"kind": "prune", "spec": {}, "data": "data/a/b", "files": {}}
    more: dict[str, Any] = {"report": {}, "peak_memory_bytes": None, "versions": {}, "host": "a"}
    return Manifest(key=key, seconds=seconds, finished=finished, **facts, **more)


def test_the_time_left_goes_by_the_rate_of_the_last_minutes(plan: Plan) -> None:
    """Four stages of 10 expected seconds took 20 each, on two workers: 40 s for each two."""
    graph = {
        key: dataclasses.replace(stage, seconds=10.0)
        for key, stage in list(plan.graph.items())[:10]
    }
    of_ten = dataclasses.replace(plan, graph=graph)
    done = {
        key: made(key, 20.0, 1000.0 + 20.0 * (number // 2 + 1))
        for number, key in enumerate(list(graph)[:4])
    }
    assert seconds_left(of_ten, done, 1040.0) == pytest.approx(6 * 20 / 2)
    assert seconds_left(of_ten, done, 9000.0) is None
    assert seconds_left(of_ten, {}, 1040.0) is None
    assert seconds_left(of_ten, dict.fromkeys(graph, done[next(iter(graph))]), 1040.0) == 0


@pytest.fixture
def address(plan: Plan, store: Store) -> str:
    ready: Queue[str] = Queue()
    arguments = (Page(plan, store), "127.0.0.1", 0, ready.put)
    threading.Thread(target=serve, args=arguments, daemon=True).start()
    return ready.get(timeout=10)


def test_a_browser_gets_the_page_and_its_figures_and_nothing_else(address: str, plan: Plan) -> None:
    page = urllib.request.urlopen(address).read().decode()
    assert "state.json" in page
    assert "http://" not in page  # nothing is read from elsewhere
    answer = urllib.request.urlopen(f"{address}/state.json")
    assert answer.headers["Content-Type"] == "application/json"
    assert json.load(answer)["grid"] == plan.grid.name
    for path in ("/manifests", "/../jobs/grid.py"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(address + path)
    with pytest.raises(urllib.error.HTTPError, match="501"):
        urllib.request.urlopen(address, data=b"no")
