"""Time limits: a stage that hangs is interrupted, and its process ended if that fails."""

import contextlib
import faulthandler
import signal
from collections.abc import Iterator
from types import FrameType

GRACE_SECONDS = 15.0
"""How long an interrupted stage has before its process is ended."""


class TimeLimitError(RuntimeError):
    """A stage took longer than its time limit."""


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise in the block once the time is over. For the main thread only.

    Code that does not return to the interpreter cannot be interrupted. Its process is ended after a
    grace period, and the worker's error log shows where it hung.

    Raises:
        TimeLimitError: if the block takes longer.
    """
    if seconds is None:
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise TimeLimitError(f"took longer than its time limit of {seconds:g} s")

    standard_error = 2  # the process's own, even if `sys.stderr` was replaced
    before = signal.signal(signal.SIGALRM, interrupt)
    faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True, file=standard_error)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
