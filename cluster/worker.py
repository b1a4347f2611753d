"""What runs on a worker: it makes one stage, from the lease to the manifest."""

import os
import platform
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster import leases
from cluster.board import Board, WritePosition, write_nothing
from cluster.graph import Stage
from cluster.helpers import Help, Helpers, helpers_of
from cluster.limits import time_limit
from cluster.memory import PeakMemory
from cluster.scratch import own_scratch
from cluster.store import Manifest, Partial, Store

CALL_SECONDS = 20.0
"""How long an actor waits for its first call, which the driver sends right after starting it."""


class WorkerLostError(RuntimeError):
    """Raised by `execute` if its process can make no further stage, as with a dead engine."""


class Execute(Protocol):
    """Makes one stage: reads `artifacts` (folders by key), writes `output`, returns a report.

    `cpus` is the number of threads. In `partial` it may keep files for the next attempt; `helpers`
    are the stage's further actors.
    """

    def __call__(
        self,
        payload: str,
        artifacts: Mapping[str, Path],
        output: Path,
        cpus: int,
        partial: Partial,
        helpers: Helpers,
    ) -> dict[str, Any]: ...


Prepared = Callable[[str, WritePosition], AbstractContextManager[None]]
"""Takes a stage's kind and a function that writes on the board; returns the context in which the
stage is made. Entering it is not part of the stage's seconds: it is for what a process does once,
such as importing libraries."""


def unprepared(kind: str, write: WritePosition) -> AbstractContextManager[None]:
    """Return a context that does nothing."""
    return nullcontext()


@dataclass(frozen=True)
class Held:
    """The result of a stage that another run is making."""

    run: str


@dataclass(frozen=True)
class Aids:
    """What surrounds the making of stages."""

    prepared: Prepared = unprepared
    """The context in which a stage is made."""
    help: Help | None = None
    """Makes a helper's part in a stage that several actors share."""


NO_AIDS = Aids()


@dataclass(frozen=True)
class Maker:
    """What is the same for all stages of a run."""

    execute: Execute
    store: str
    """URL."""
    versions: dict[str, str]
    run: str
    aids: Aids = NO_AIDS
    board: Board | None = None


def make_artifact(stage: Stage, maker: Maker, dead: frozenset[str]) -> Manifest | Held:
    """Make a stage, unless another run is making it or has just made it.

    Args:
        dead: runs whose leases may be taken over.
    """
    own_scratch()
    store = Store(maker.store)
    holder = leases.acquire(store, stage.key, maker.run, dead)
    if holder is not None:
        return Held(holder)
    try:
        with time_limit(stage.resources.time_limit_seconds):
            return store.manifest(stage.key) or _make(stage, maker, store)
    finally:
        leases.release(store, stage.key, maker.run)


def _make(stage: Stage, maker: Maker, store: Store) -> Manifest:
    write: WritePosition = write_nothing if maker.board is None else maker.board.start(stage.key)
    with maker.aids.prepared(stage.kind, write):
        started = time.monotonic()
        write("reading inputs", 0, 0, "")
        artifacts = {key: store.fetch(key) for key in stage.inputs}
        write("", 0, 0, "")
        with (
            helpers_of(stage, maker.aids.help, maker.store, maker.aids.prepared) as helpers,
            store.attempt(stage.key) as attempt,
            PeakMemory() as memory,
        ):
            report = maker.execute(
                stage.payload,
                artifacts,
                attempt.folder,
                stage.resources.cpus,
                attempt.partial,
                helpers,
            )
            write("storing", 0, 0, "")
            return attempt.commit(
                kind=stage.kind,
                spec=dict(stage.spec),
                report=report,
                seconds=time.monotonic() - started,
                peak_memory_bytes=memory.peak(),
                versions=maker.versions,
                host=platform.node(),
            )


class Replica:
    """An actor that makes one stage after another and keeps what its process has loaded.

    Its process ends if its first call does not come soon. Ray ignores a kill that arrives while an
    actor is being created: without the timer such an actor would hold its resources forever.
    """

    def __init__(self) -> None:
        self._timer = threading.Timer(CALL_SECONDS, os._exit, (1,))
        self._timer.daemon = True
        self._timer.start()

    def start(self) -> None:
        """Return once the process is up."""
        self._timer.cancel()

    def make(self, stage: Stage, maker: Maker, dead: frozenset[str]) -> Manifest | Held:
        """Make one stage."""
        self._timer.cancel()
        return make_artifact(stage, maker, dead)
