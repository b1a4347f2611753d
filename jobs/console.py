"""The console to which commands print their tables, or JSON."""

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

_LOG_COLUMNS = 160
"""Width of tables written to a file, a pipe or a job's log, in characters."""

console = Console(width=None if sys.stdout.isatty() else _LOG_COLUMNS)

AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON, for programs.")]


def print_json(value: Any, console: Console) -> None:
    """Print a value as one line of JSON; NaN and infinities are errors."""
    console.out(json.dumps(value, allow_nan=False), highlight=False)
