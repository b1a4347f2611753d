"""What every stage is given, and what it may hold from one to the next."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, Protocol, TypeVar

Artifacts = Mapping[str, Path]
"""A stage's input artifacts: key to local folder."""

Value = TypeVar("Value")


class Keep(Protocol):
    """Files that outlive an attempt at a stage, for the next attempt at the same stage."""

    def keep(self, path: Path) -> None:
        """Keep a file under its name; it must not change any more."""

    def restore(self, path: Path) -> bool:
        """Put the file that was kept under that name at `path`; False if there is none, or none
        that is undamaged."""


class Latest(Generic[Value]):
    """The value last asked for, so that the shards on one worker load and read it once.

    The one before is let go before the next is made: two models need not fit together.

    Args:
        release: what frees a value that reference counting does not.
    """

    def __init__(self, release: Callable[[Value], None] = lambda value: None) -> None:
        self._held: dict[object, Value] = {}
        self._release = release

    def get(self, key: object, make: Callable[[], Value]) -> Value:
        """The value of a key, made unless it is the last one's."""
        if key not in self._held:
            for value in self._held.values():
                self._release(value)
            self._held.clear()
            self._held[key] = make()
        return self._held[key]

    def forget(self) -> None:
        """Let go of the value without releasing it: whoever has it keeps it."""
        self._held.clear()
