"""What a person is told of a stage that failed: the error in one line, and what to do about it."""

import errno
from collections.abc import Callable

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

from cluster.graph import Stage
from cluster.limits import TimeLimitError
from cluster.store import FULL


def one_line(error: BaseException, stage: Stage) -> str:
    """The exception's type and first line, with a remedy where one is known."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = f"{type(error).__name__}: {lines[0] if lines else ''}"
    for applies, remedy in _REMEDIES:
        if applies(error):
            return f"{told}; {remedy.format(resources=f'resources.{stage.kind}')}"
    return told


def lacks_device_memory(error: BaseException) -> bool:
    """Whether it is torch's own error; by name, since the cluster knows nothing of torch."""
    return any(
        kind.__name__ == "OutOfMemoryError" and kind.__module__.partition(".")[0] == "torch"
        for kind in type(error).__mro__
    )


def _lacks_space(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in FULL


def _is_refused(error: BaseException) -> bool:
    refusals = (errno.EACCES, errno.EROFS, errno.EIO)
    return isinstance(error, OSError) and error.errno in refusals


_REMEDIES: tuple[tuple[Callable[[BaseException], bool], str], ...] = (
    (
        lacks_device_memory,
        "the device's memory is too small for it, or shared with too many: raise {resources}.gpus, "
        "lower batch sizes, or take a larger device",
    ),
    (
        lambda error: isinstance(error, MemoryError | OutOfMemoryError),
        "the node's memory was full: set or raise {resources}.memory_bytes, so that fewer stages "
        "share a node, or take larger nodes",
    ),
    (
        lambda error: isinstance(error, TimeLimitError),
        "raise {resources}.time_limit_seconds if it does need longer",
    ),
    (
        lambda error: isinstance(error, WorkerCrashedError | RayActorError | NodeDiedError),
        "its process or node was ended from outside each time it was tried, as a system does that "
        "lacks memory: set or raise {resources}.memory_bytes, or {resources}.retries if nodes "
        "come and go",
    ),
    (_lacks_space, "no space is left: free some where the store and the temporary files are"),
    (_is_refused, "see that the store and the temporary folder can be read and written"),
)
"""In the order in which they are tried."""
