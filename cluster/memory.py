"""The most host memory that a stretch of work held at one time."""

import contextlib
from pathlib import Path
from types import TracebackType

_RESET_HIGH_WATER_MARK = "5"


class PeakMemory:
    """Measures the process's resident memory between entry and `peak`.

    Linux keeps a high-water mark and lets a process reset its own; where that is not to be had
    the peak is unknown, rather than that of some earlier work.
    """

    def __enter__(self) -> "PeakMemory":
        self._known = False
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text(_RESET_HIGH_WATER_MARK)
            self._known = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def peak(self) -> int | None:
        """Bytes, or None where the system does not tell."""
        if not self._known:
            return None
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None
