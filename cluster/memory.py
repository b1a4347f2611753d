"""The peak host memory of a piece of work."""

import contextlib
from pathlib import Path
from types import TracebackType

_RESET_HIGH_WATER_MARK = "5"


class PeakMemory:
    """Measures the process's resident memory between entry and `peak`.

    Linux keeps a high-water mark that a process may reset. If it cannot be reset, the peak is
    unknown, since it could be that of earlier work.
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
        """Return bytes, or None if unknown."""
        if not self._known:
            return None
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None
