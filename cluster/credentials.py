"""Credentials of a submitted job: a file beside its code, never part of what Ray logs.

Ray writes a job's runtime environment, variables included, to the logs of every node. So the values
of tokens travel in the job's working directory instead.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

CREDENTIALS_FILE = ".credentials.json"

_BESIDE_THE_CODE = Path(__file__).parents[1] / CREDENTIALS_FILE


def enclose_credentials(folder: Path, variables: Mapping[str, str]) -> None:
    """Write environment variables and their values into a folder of code to be submitted."""
    path = folder / CREDENTIALS_FILE
    path.touch(mode=0o600)
    path.write_text(json.dumps(dict(variables)))


def has_credentials() -> bool:
    """Return whether credentials came with this code."""
    return _BESIDE_THE_CODE.is_file()


def set_credentials() -> None:
    """Set the variables that came with this code, for this process and those it starts."""
    if has_credentials():
        os.environ.update(json.loads(_BESIDE_THE_CODE.read_text()))
