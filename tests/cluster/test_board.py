import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.board import Board, Position, WritePosition
from cluster.graph import Graph, Stage
from cluster.helpers import Helpers
from cluster.run import run_graph
from cluster.store import Partial, Store
from cluster.watcher import Watcher
from cluster.worker import Aids

pytestmark = pytest.mark.usefixtures("local_ray")

_writers: list[WritePosition] = []


@contextmanager
def prepared(kind: str, write: WritePosition) -> Iterator[None]:
    _writers.append(write)
    try:
        yield
    finally:
        _writers.pop()


def work(
    payload: str,
    artifacts: dict[str, Path],
    output: Path,
    cpus: int,
    partial: Partial,
    helpers: Helpers,
) -> dict[str, Any]:
    """Wait for the file that the payload names."""
    _writers[-1]("loading the model", 0, 0, "")
    _writers[-1]("", 12, 30, "layers")
    deadline = time.monotonic() + 60
    while not Path(payload).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return {}


def stages(payload: str, count: int) -> Graph:
    return {
        f"k-{number}": Stage(
            key=f"k-{number}", kind="k", label="", spec={}, payload=payload, inputs=()
        )
        for number in range(count)
    }


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board()
    yield made
    made.close()


def soon(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_the_board_has_a_stages_position_until_it_ends(board: Board) -> None:
    write = board.start("k")
    write("loading the model", 0, 0, "")
    write("", 12, 30, "layers")
    positions: list[Position] = []

    def arrived() -> bool:
        positions.extend(board.read().values())  # none as long as its actor starts
        return bool(positions) and positions[-1].done == 12

    assert soon(arrived)
    position = positions[-1]
    assert (position.phase, position.total, position.unit) == ("", 30, "layers")
    assert position.share == pytest.approx(0.4)
    assert 0 <= position.phase_seconds <= position.seconds < 30
    board.end("k")
    write("storing", 0, 0, "")  # too late: ignored
    assert soon(lambda: not board.read())


def test_a_stage_writes_once_a_second_and_at_every_phase(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[object, ...]] = []
    monkeypatch.setattr(Board, "_write", lambda self, *arguments: written.append(arguments))
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    write = board.start("k")
    for step in range(101):
        clock[0] = step / 10
        write("", step, 100, "tokens")
    write("storing", 0, 0, "")
    assert [each[3] for each in written[1:-1]] == list(range(0, 101, 10))
    assert written[-1] == ("update", "k", "storing", 0, 0, "")


def test_a_stage_that_waits_for_room_is_not_at_work(tmp_path: Path, board: Board) -> None:
    """Two of four stages have room."""
    at_work: list[int] = []
    go = tmp_path / "go"

    def look() -> None:
        soon(lambda: len(board.read()) == 2)
        time.sleep(0.5)  # no more than two come
        at_work.append(len(board.read()))
        go.touch()

    looker = threading.Thread(target=look)
    looker.start()
    store = Store(str(tmp_path / "store"))
    graph = stages(str(go), 4)
    outcome = run_graph(
        graph, list(graph), work, store, {}, aids=Aids(prepared), watcher=Watcher(board)
    )
    looker.join()
    assert len(outcome.made) == 4
    assert at_work == [2]
    assert soon(lambda: not board.read())


def test_a_run_continues_without_its_board(tmp_path: Path) -> None:
    board = Board()
    assert board.read() == {}
    ray.kill(board._actor)
    (tmp_path / "go").touch()
    graph = stages(str(tmp_path / "go"), 3)
    store = Store(str(tmp_path / "store"))
    outcome = run_graph(
        graph, list(graph), work, store, {}, aids=Aids(prepared), watcher=Watcher(board)
    )
    assert len(outcome.made) == 3
    assert board.read() == {}


def test_the_board_takes_no_cpu(board: Board) -> None:
    assert board.read() == {}  # it is up
    assert soon(lambda: ray.available_resources().get("CPU") == 2)


def test_a_phase_without_a_known_end_has_no_share() -> None:
    assert Position(1.0, done=7, unit="requests").share == 0.0
