"""What every stage is given, and what a worker holds between stages."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, Protocol, TypeVar

Artifacts = Mapping[str, Path]
"""A stage's input artifacts, key to local folder."""

Value = TypeVar("Value")


class Keep(Protocol):
    """Keeps files of one attempt at a stage for the next attempt."""

    def keep(self, path: Path) -> None:
        """Keep a file under its name; it must not change afterwards."""

    def restore(self, path: Path) -> bool:
        """Restore the kept file of that name to `path`; False if it is missing or damaged."""


class Latest(Generic[Value]):
    """The value last asked for, so that the shards on one worker load it once.

    It is dropped before the next one is made: two models need not fit in memory.

    Args:
        release: frees what reference counting does not.
    """

    def __init__(self, release: Callable[[Value], None] = lambda value: None) -> None:
        self._held: dict[object, Value] = {}
        self._release = release

    def get(self, key: object, make: Callable[[], Value]) -> Value:
        """Return the value of a key; make it unless it is the last one's."""
        if key not in self._held:
            for value in self._held.values():
                self._release(value)
            self._held.clear()
            self._held[key] = make()
        return self._held[key]

    def forget(self) -> None:
        """Drop the value without releasing it: its user keeps it."""
        self._held.clear()
