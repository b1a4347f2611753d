"""What every worker is doing: workers write it on a board, and whoever watches a run reads it.

The board is an actor without CPUs. Workers do not wait for it, and go on without it if it is lost.
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
"""Between two things that one stage writes in the same phase."""

READ_SECONDS = 5.0
"""How long a reader waits for the board."""

Tell = Callable[[str, float, float, str], None]
"""Takes a stage's phase, how much of it is done, how much there is (0 where nobody knows), and the
unit of both."""


@dataclass(frozen=True)
class Position:
    """How far a stage is on its worker."""

    seconds: float
    """Since it started there."""
    phase: str = ""
    """Empty in its main work."""
    phase_seconds: float = 0.0
    """Since the phase began."""
    done: float = 0.0
    total: float = 0.0
    """0 where nobody knows."""
    unit: str = ""

    @property
    def share(self) -> float:
        """How much of the phase is done, 0 to 1."""
        return min(1.0, self.done / self.total) if self.total else 0.0


@dataclass
class _Note:
    begun: float
    phase: str
    phase_begun: float
    done: float = 0.0
    total: float = 0.0
    unit: str = ""


class Notes:
    """The board's own process; by its clock alone seconds are counted."""

    def __init__(self) -> None:
        self._notes: dict[str, _Note] = {}

    def start(self, key: str) -> None:
        """A worker begins a stage, maybe once more."""
        now = time.monotonic()
        self._notes[key] = _Note(now, "", now)

    def update(self, key: str, phase: str, done: float, total: float, unit: str) -> None:
        """A stage is so far; one that has ended meanwhile is not."""
        note = self._notes.get(key)
        if note is None:
            return
        if note.phase != phase:
            note.phase, note.phase_begun = phase, time.monotonic()
        note.done, note.total, note.unit = done, total, unit

    def end(self, key: str) -> None:
        """The driver has the stage's result, or knows that its worker is lost."""
        self._notes.pop(key, None)

    def read(self) -> dict[str, Position]:
        """All stages at work."""
        now = time.monotonic()
        return {
            key: Position(
                now - note.begun,
                note.phase,
                now - note.phase_begun,
                note.done,
                note.total,
                note.unit,
            )
            for key, note in self._notes.items()
        }


_remote_notes = ray.remote(Notes)


class Board:
    """A handle of the board, for the driver and its workers."""

    def __init__(self) -> None:
        """Start it, on the driver's node if that has room: no other node has to stay for it."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}
        self._notes: Any = _remote_notes.options(**options).remote()

    def start(self, key: str) -> Tell:
        """Write that a stage begins; what it returns writes how far it is, at most once a second
        and whenever its phase changes."""
        self._write("start", key)
        last = -WRITE_SECONDS
        last_phase = ""

        def tell(phase: str, done: float, total: float, unit: str) -> None:
            nonlocal last, last_phase
            now = time.monotonic()
            if phase != last_phase or now - last >= WRITE_SECONDS:
                last, last_phase = now, phase
                self._write("update", key, phase, done, total, unit)

        return tell

    def end(self, key: str) -> None:
        """Take a stage off."""
        self._write("end", key)

    def read(self) -> Mapping[str, Position]:
        """How far every stage at work is; nothing while the board does not answer."""
        try:
            positions: Mapping[str, Position] = ray.get(
                self._notes.read.remote(), timeout=READ_SECONDS
            )
        except RayError:
            return {}
        return positions

    def close(self) -> None:
        """End its process."""
        ray.kill(self._notes)

    def _write(self, method: str, *arguments: object) -> None:
        with contextlib.suppress(RayError):
            getattr(self._notes, method).remote(*arguments)
