"""A stage's progress, passed on to a reporter. Without one, as in a notebook, it costs nothing."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

Reporter = Callable[[str, float, float, str], None]
"""Takes the phase, how much of it is done, how much there is (0 if unknown), and the unit of both.
It is called often, and should pass on its arguments about once a second."""

_Item = TypeVar("_Item")

_reporter: ContextVar[Reporter | None] = ContextVar("reporter", default=None)
_phase: ContextVar[str] = ContextVar("phase", default="")


@contextlib.contextmanager
def reporting(reporter: Reporter) -> Iterator[None]:
    """Pass on to a reporter what stages report within the block."""
    reporters, phases = _reporter.set(reporter), _phase.set("")
    try:
        yield
    finally:
        _reporter.reset(reporters)
        _phase.reset(phases)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Name what the stage does in the block or decorated function, such as `loading the model`.

    A stage's main work has no name.
    """
    reporter = _reporter.get()
    if reporter is None:
        yield
        return
    before = _phase.get()
    _phase.set(name)
    reporter(name, 0.0, 0.0, "")
    try:
        yield
    finally:
        _phase.set(before)
        reporter(before, 0.0, 0.0, "")


def report(done: float, total: float, unit: str) -> None:
    """Report how much of the current phase is done, such as 12 of 30 `layers`."""
    reporter = _reporter.get()
    if reporter is not None:
        reporter(_phase.get(), done, total, unit)


def counted(items: Iterable[_Item], total: float, unit: str) -> Iterator[_Item]:
    """Yield the items; report each as done when the next one is asked for."""
    report(0, total, unit)
    for done, item in enumerate(items, start=1):
        yield item
        report(done, total, unit)


class TokenStream:
    """A `streamer` for transformers' `generate` that reports the tokens of every step.

    Args:
        total: tokens that are generated if no text ends early.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.prompt_is_next = True

    def put(self, tokens: Any) -> None:
        """Count one step's tokens `[batch]`; the first call has the prompt."""
        if not self.prompt_is_next:
            self.done += tokens.numel()
            report(self.done, self.total, "tokens")
        self.prompt_is_next = False

    def end(self) -> None:
        """Expect the prompt of another batch."""
        self.prompt_is_next = True
