"""What every stage is given, and what a worker holds between stages."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

Artifacts = Mapping[str, Path]
"""A stage's input artifacts, key to local folder."""

Value = TypeVar("Value")


class Keep(Protocol):
    """Keeps files of one attempt at a stage for the next attempt."""

    def keep(self, path: Path) -> None:
        """Keep a file under its name; it must not change afterwards."""

    def restore(self, path: Path) -> bool:
        """Restore the kept file of that name to `path`; False if it is missing or damaged."""


class Helpers(Protocol):
    """Further processes, each with a device of its own, that share the work of a stage."""

    @property
    def count(self) -> int:
        """How many there are."""

    def call(self, helper: int, method: str, *arguments: Any, returns: int = 1) -> Any:
        """Start a method of the object that a helper made for the stage, after those before it.

        Args:
            arguments: values, which are copied at once, or promises of other calls.
            returns: how many values the method returns, as a tuple if there are several.

        Returns:
            A promise of the value; a list of promises if there are several.
        """

    def value(self, promise: Any) -> Any:
        """Wait for a call, and return its value; raises what the call has raised."""


class NoHelpers:
    """Stands for the helpers of a stage that works alone."""

    count = 0

    def call(self, helper: int, method: str, *arguments: Any, returns: int = 1) -> Any:
        """Raise an error."""
        raise IndexError(f"there is no helper {helper}")

    def value(self, promise: Any) -> Any:
        """Raise an error."""
        raise LookupError("there is no helper whose call could have ended")


NO_HELPERS = NoHelpers()


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
