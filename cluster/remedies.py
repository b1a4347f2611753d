"""The one-line error of a failed stage, with what to do about it."""

import errno
from collections.abc import Callable

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

from cluster.graph import Stage
from cluster.limits import TimeLimitError
from cluster.store import NO_SPACE


def one_line(error: BaseException, stage: Stage) -> str:
    """Return the exception's type and first line, with a remedy if one is known."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = f"{type(error).__name__}: {lines[0] if lines else ''}"
    for applies, remedy in _REMEDIES:
        if applies(error):
            return f"{line}; {remedy.format(resources=f'resources.{stage.kind}')}"
    return line


def lacks_device_memory(error: BaseException) -> bool:
    """Return whether this is torch's `OutOfMemoryError`; by name, since the cluster does not import
    torch."""
    return any(
        kind.__name__ == "OutOfMemoryError" and kind.__module__.partition(".")[0] == "torch"
        for kind in type(error).__mro__
    )


def _lacks_space(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in NO_SPACE


def _is_refused(error: BaseException) -> bool:
    refusals = (errno.EACCES, errno.EROFS, errno.EIO)
    return isinstance(error, OSError) and error.errno in refusals


_REMEDIES: tuple[tuple[Callable[[BaseException], bool], str], ...] = (
    (
        lacks_device_memory,
        "the device has too little memory, or too many stages share it: raise {resources}.gpus, "
        "lower batch sizes, or use a larger device",
    ),
    (
        lambda error: isinstance(error, MemoryError | OutOfMemoryError),
        "the node's memory was full: set or raise {resources}.memory_bytes, so that fewer stages "
        "share a node, or use larger nodes",
    ),
    (
        lambda error: isinstance(error, TimeLimitError),
        "raise {resources}.time_limit_seconds if it does need longer",
    ),
    (
        lambda error: isinstance(error, WorkerCrashedError | RayActorError | NodeDiedError),
        "its process or node was killed at every try, as systems do when memory runs out: set or "
        "raise {resources}.memory_bytes, or {resources}.retries if nodes come and go",
    ),
    (_lacks_space, "no space is left: free some for the store and for temporary files"),
    (_is_refused, "check that the store and the temporary folder can be read and written"),
)
"""Tried in this order."""
