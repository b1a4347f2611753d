"""The Slurm script on this machine: Slurm's commands are stand-ins, Ray and the grid are real."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import cluster
from tests.e2e.conftest import Finished, environment

SCRIPT = Path(str(cluster.__file__)).parent / "deploy/slurm.sh"

COMMANDS = {
    "scontrol": 'printf "node-1\\nnode-2\\n"',
    # Drops its own options, and runs the command here.
    "srun": 'while [[ $1 == --* ]]; do shift; done; echo "$*" >> "$CALLS"; exec "$@"',
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script that Slurm starts on the first of two nodes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in COMMANDS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    given = environment()
    del given["RAY_AUTH_MODE"]
    return {
        **given,
        "PATH": f"{folder}{os.pathsep}{given['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node-[1-2]",
        "SLURM_CPUS_PER_TASK": "1",
    }


def test_a_slurm_job_forms_a_cluster_runs_its_grid_and_ends_all(
    finished: tuple[Path, Finished], grid: Path, slurm: dict[str, str], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(finished[0], store)
    for path in sorted((store / "manifests").glob("evaluate-*"))[:2]:  # work for both nodes
        path.unlink()
    run = subprocess.run(
        ["bash", SCRIPT, grid, store],
        env=slurm,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert (store / "results/tiny.csv").read_bytes() == (
        finished[0] / "results/tiny.csv"
    ).read_bytes()
    calls = (tmp_path / "calls").read_text().splitlines()
    starts = [call for call in calls if call.startswith("ray start")]
    assert len(starts) == 2
    assert "--head" in starts[0]
    address = starts[1].split("--address=")[1]
    assert address in calls[-1]
    assert run.stdout.count("Ray runtime started.") == 2
    alive = subprocess.run(["pgrep", "-f", address], capture_output=True, text=True)
    assert alive.stdout == ""


def test_a_slurm_job_without_a_store_says_what_is_missing(slurm: dict[str, str]) -> None:
    run = subprocess.run(["bash", SCRIPT, "g.yaml"], env=slurm, capture_output=True, text=True)
    assert run.returncode == 2
    assert "usage: sbatch slurm.sh GRID STORE" in run.stderr


def test_a_requeued_slurm_job_keeps_the_log_of_its_earlier_attempts() -> None:
    assert "\n#SBATCH --open-mode=append\n" in SCRIPT.read_text()
