"""What every worker is doing: workers write it on a board, and whoever watches a run reads it.

The board is an actor without CPUs. Workers do not wait for it, and work on if it is lost.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

WRITE_SECONDS = 1.0
"""The least time between two writes of one stage in the same phase."""

READ_SECONDS = 5.0
"""How long a reader waits for the board."""

WritePosition = Callable[[str, float, float, str], None]
"""Takes a stage's phase, how much of it is done, how much there is (0 if unknown), and the unit of
both."""


def write_nothing(phase: str, done: float, total: float, unit: str) -> None:
    """Ignore a stage's position."""


@dataclass(frozen=True)
class Position:
    """How far a stage is on its worker."""

    seconds: float
    """Since the stage began there."""
    phase: str = ""
    """Empty in the stage's main work."""
    phase_seconds: float = 0.0
    """Since the phase began."""
    done: float = 0.0
    total: float = 0.0
    """0 if unknown."""
    unit: str = ""

    @property
    def share(self) -> float:
        """Return how much of the phase is done, 0 to 1."""
        return min(1.0, self.done / self.total) if self.total else 0.0


@dataclass
class _Entry:
    began: float
    phase: str
    phase_began: float
    done: float = 0.0
    total: float = 0.0
    unit: str = ""


class BoardActor:
    """The board's own process. All seconds are counted by its clock."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def start(self, key: str) -> None:
        """Add a stage, or begin it again."""
        now = time.monotonic()
        self._entries[key] = _Entry(now, "", now)

    def update(self, key: str, phase: str, done: float, total: float, unit: str) -> None:
        """Set a stage's position; ignore a stage that has ended meanwhile."""
        entry = self._entries.get(key)
        if entry is None:
            return
        if entry.phase != phase:
            entry.phase, entry.phase_began = phase, time.monotonic()
        entry.done, entry.total, entry.unit = done, total, unit

    def end(self, key: str) -> None:
        """Remove a stage whose result the driver has, or whose worker is lost."""
        self._entries.pop(key, None)

    def read(self) -> dict[str, Position]:
        """Return the positions of all stages at work, by key."""
        now = time.monotonic()
        return {
            key: Position(
                now - entry.began,
                entry.phase,
                now - entry.phase_began,
                entry.done,
                entry.total,
                entry.unit,
            )
            for key, entry in self._entries.items()
        }


_remote_board = ray.remote(BoardActor)


class Board:
    """A handle of the board, for the driver and its workers."""

    def __init__(self) -> None:
        """Start the board on the driver's node if that has room, so that no other node must stay
        for it."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}
        self._actor: Any = _remote_board.options(**options).remote()

    def start(self, key: str) -> WritePosition:
        """Write that a stage begins.

        Returns:
            A function that writes the stage's position, at most once a second and at every change
            of its phase.
        """
        self._write("start", key)
        last = -WRITE_SECONDS
        last_phase = ""

        def write(phase: str, done: float, total: float, unit: str) -> None:
            nonlocal last, last_phase
            now = time.monotonic()
            if phase != last_phase or now - last >= WRITE_SECONDS:
                last, last_phase = now, phase
                self._write("update", key, phase, done, total, unit)

        return write

    def end(self, key: str) -> None:
        """Remove a stage."""
        self._write("end", key)

    def read(self) -> Mapping[str, Position]:
        """Return the positions of all stages at work; none if the board does not answer."""
        try:
            positions: Mapping[str, Position] = ray.get(
                self._actor.read.remote(), timeout=READ_SECONDS
            )
        except RayError:
            return {}
        return positions

    def close(self) -> None:
        """End the board's process."""
        ray.kill(self._actor)

    def _write(self, method: str, *arguments: object) -> None:
        with contextlib.suppress(RayError):
            getattr(self._actor, method).remote(*arguments)
