"""Secrets of a submitted job: a file beside its code, never a part of what Ray logs.

A job's runtime environment, variables included, is written to the logs of every node, so the
values of tokens must not be in it. They travel in the job's working directory instead.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

FILE = ".secrets.json"

_BESIDE_THE_CODE = Path(__file__).parents[1] / FILE


def enclose(folder: Path, variables: Mapping[str, str]) -> None:
    """Put variables and their values into a folder of code that is about to be sent."""
    path = folder / FILE
    path.touch(mode=0o600)
    path.write_text(json.dumps(dict(variables)))


def enclosed() -> bool:
    """Whether secrets came with this code."""
    return _BESIDE_THE_CODE.is_file()


def load() -> None:
    """Set the variables that came with this code, in this process and those it starts."""
    if enclosed():
        os.environ.update(json.loads(_BESIDE_THE_CODE.read_text()))
