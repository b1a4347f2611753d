"""The console to which commands print their tables."""

import sys

from rich.console import Console

_LOG_COLUMNS = 160
"""Width of tables written to a file, a pipe or a job's log, in characters."""

console = Console(width=None if sys.stdout.isatty() else _LOG_COLUMNS)
