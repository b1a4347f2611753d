"""A stage that hangs is ended, by the system if Python cannot."""

import contextlib
import faulthandler
import signal
from collections.abc import Iterator
from types import FrameType

GRACE_SECONDS = 15.0
"""How long a stage may take to end itself before its process is ended."""


class TimeLimitError(RuntimeError):
    """A stage took longer than its time limit."""


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise in the main thread once the time is over.

    Code that never returns to the interpreter cannot be interrupted: its process is ended after a
    grace, with where it hung in the worker's error log. To be used in the main thread.

    Raises:
        TimeLimitError: if the block takes longer.
    """
    if seconds is None:
        yield
        return

    def over(number: int, frame: FrameType | None) -> None:
        raise TimeLimitError(f"took longer than its time limit of {seconds:g} s")

    standard_error = 2  # the process's own, whatever `sys.stderr` is at present
    before = signal.signal(signal.SIGALRM, over)
    faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True, file=standard_error)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
