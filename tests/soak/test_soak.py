import json
import os
import subprocess
import sys

from tests.soak.nodes import PROJECT


def test_a_few_random_kills_leave_the_undisturbed_table() -> None:
    words = [sys.executable, "-m", "tests.soak.soak", "--kills", "4", "--seed", "1"]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    run = subprocess.run(words, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout[run.stdout.index("{") :])
    assert sum(figures["kills"].values()) == 4
    assert figures["tables_equal"] == figures["runs"] >= 1
