"""The demo as one command: a real language model pruned 27 ways, with table, texts and report."""

import subprocess
import sys

from jobs.grid_files import GRIDS

GRID = GRIDS / "demo.yaml"
PROMPT = "The history of the city begins"
REFERENCE = "wikipedia"


def report_demo(store: str) -> int:
    """Print the demo's advice and write its report; return the exit code.

    A process of its own, as this package does not import the analysis.
    """
    words = ["report", store, "--grid", GRID.stem, "--reference", REFERENCE]
    return subprocess.run([sys.executable, "-m", "analysis", *words], check=False).returncode
