"""The Slurm script in a real Slurm whose nodes are lost: `python -m tests.soak.slurm`.

Slurm's daemons run on this machine, one `slurmd` a node. The job loses a node that is not the head,
and its second attempt loses the head. Slurm requeues it each time. The table must be that of an
undisturbed run. Needs `apt-get install munge slurmctld slurmd slurm-client`.
"""

import argparse
import contextlib
import getpass
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests.soak.nodes import PROJECT

SCRIPT = PROJECT / "cluster/deploy/slurm.sh"

GRID = f"""
name: requeued
models: {{testbed: testbed-tiny}}
corpora:
  pretraining: testbed-pretraining
  mismatched: testbed-mismatched
  heldout: {{preset: testbed-pretraining, split: evaluation}}
calibrations:
  pretraining: {{corpus: pretraining}}
  self-generated: {{prefixes: mismatched, num_samples: 48, shard_size: 16, drop_fraction: 0.2}}
cells:
  model: testbed
  calibration: [pretraining, self-generated]
  pruner: [magnitude, wanda, sparsegpt]
  sparsity: [0.5, 0.6, "2:4"]
  seed: {list(range(24))}
  nsamples: 16
  seqlen: 64
evaluate:
  perplexity: [{{corpus: heldout, seqlen: 64, max_windows: 32}}]
"""
"""So many seeds that there is work left when Slurm notices that a node is lost."""

JOB_NODES = 3
SPARE_NODES = 1
"""So that the requeued job has a node in place of the lost one."""

CONFIGURATION = """
ClusterName=trial
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdTimeout=10
KillWait=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
{nodes}
PartitionName=all Nodes=ALL Default=YES
"""

LONGEST_WAIT_SECONDS = 900.0

since = time.monotonic()


def say(what: str) -> None:
    """Print what happened, and when."""
    print(f"{time.monotonic() - since:6.1f} s  {what}", flush=True)


def wait_for(what: str, value: Callable[[], bool]) -> None:
    """Wait until a function returns true, and say so."""
    deadline = time.monotonic() + LONGEST_WAIT_SECONDS
    while not value():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.2)
    say(what)


def free_ports(count: int) -> list[int]:
    """Return different ports that nothing listens at."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class Slurm:
    """Slurm with so many nodes on this machine, all of its files in one folder."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.names = [f"node{number}" for number in range(1, count + 1)]
        ports = free_ports(count + 1)
        nodes = [
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1"
            f" Port={port} CPUs={os.cpu_count()}"
            for name, port in zip(self.names, ports[1:], strict=True)
        ]
        self.configuration = folder / "slurm.conf"
        self.configuration.write_text(
            CONFIGURATION.format(
                folder=folder, ports=ports, user=getpass.getuser(), nodes="\n".join(nodes)
            )
        )
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = {
            **kept,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin",
            "PYTHONPATH": str(PROJECT),
            "RAY_TMPDIR": str(folder),
            "SLURM_CONF": str(self.configuration),
        }

    def start(self) -> None:
        """Start all daemons."""
        files = {"key-file": "key", "socket": "sock", "pid-file": "pid", "seed-file": "seed"}
        self.daemon(
            "munged",
            "--foreground",
            "--force",  # its folder belongs to whoever runs this
            *(f"--{option}={self.folder}/munge.{suffix}" for option, suffix in files.items()),
        )
        wait_for("munged answers", (self.folder / "munge.sock").exists)
        self.daemon("slurmctld", "-D")
        for name in self.names:
            self.join(name)
        count = len(self.names)
        wait_for(f"{count} nodes are idle", lambda: self.states().count("idle") == count)

    def daemon(self, *words: str) -> None:
        """Start one of Slurm's programs."""
        with (self.folder / "daemons.log").open("ab") as log:
            subprocess.Popen(words, env=self.environment, stdout=log, stderr=log)

    def join(self, name: str) -> None:
        """Start a node."""
        self.daemon("slurmd", "-D", "-N", name)

    def call(self, *words: str | Path) -> str:
        """Return what one of Slurm's commands prints."""
        run = subprocess.run(
            words, env=self.environment, cwd=self.folder, check=True, capture_output=True, text=True
        )
        return run.stdout

    def states(self) -> list[str]:
        """Return the state of each node."""
        return self.call("sinfo", "--noheader", "--Node", "--format=%T").split()

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm knows of a job."""
        fields = self.call("scontrol", "show", "job", "--oneliner", number).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def nodes_of(self, number: str) -> list[str]:
        """Return the nodes of a job, its head first."""
        return self.call("scontrol", "show", "hostnames", self.job(number)["NodeList"]).split()

    def processes(self) -> Iterator[tuple[psutil.Process, str]]:
        """Yield all processes of this Slurm and its jobs, and for those of jobs their node."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                variables = process.environ()
                if variables.get("SLURM_CONF") == str(self.configuration):
                    yield process, variables.get("SLURMD_NODENAME", "")

    def of_jobs(self) -> list[psutil.Process]:
        """Return the processes of jobs, on all nodes."""
        return [process for process, node in self.processes() if node]

    def lose(self, name: str) -> None:
        """Kill all processes of a node at once, as when it loses its power."""
        daemons, of_jobs, steps = [], [], []
        for process, node in self.processes():
            with contextlib.suppress(psutil.Error):
                if node == name:
                    of_jobs.append(process)
                    # What starts a job's processes does not know its node.
                    parent = process.parent()
                    if parent is not None and "slurmstepd" in parent.name():
                        steps.append(parent)
                elif process.cmdline()[-2:] == ["-N", name]:
                    daemons.append(process)
        kill([*daemons, *steps, *of_jobs])  # in this order, so that nobody reports the others' end

    def end(self) -> None:
        """Kill all that is left."""
        while found := [process for process, _ in self.processes()]:
            kill(found)
            time.sleep(0.2)


def kill(processes: list[psutil.Process]) -> None:
    """Kill processes and all that they started."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            for each in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()


def made(store: Path) -> dict[str, int]:
    """Return when each artifact of a store was finished, in nanoseconds."""
    found = (store / "manifests").glob("*.json")
    return {path.stem: path.stat().st_mtime_ns for path in found}


def lose(slurm: Slurm, number: str, store: Path, place: int, enough: int) -> dict[str, int]:
    """Take a node from a job, and wait until it has been requeued and runs again.

    Args:
        number: of the job.
        place: of the node among the job's; the first is the head.
        enough: how many artifacts are made before that; more than there are already.

    Returns:
        The artifacts that were finished when the node was lost.
    """
    assert len(made(store)) < enough, "nothing is left for this attempt: take more seeds"
    wait_for(f"{enough} artifacts are made", lambda: len(made(store)) >= enough)
    lost, restarts = slurm.nodes_of(number)[place], slurm.job(number)["Restarts"]
    slurm.lose(lost)
    kept = made(store)
    what = "the head" if place == 0 else "not the head"
    say(f"{lost} is lost, {what}; {len(kept)} artifacts are made")
    wait_for("Slurm has requeued the job", lambda: slurm.job(number)["Restarts"] != restarts)
    wait_for("no process of the job is left", lambda: not slurm.of_jobs())
    say(f"{len(made(store))} artifacts are made")
    wait_for("the job runs again", lambda: slurm.job(number)["JobState"] == "RUNNING")
    say(f"on {', '.join(slurm.nodes_of(number))}")
    slurm.join(lost)
    return kept


def trial(folder: Path) -> bool:
    """Run the grid undisturbed and in Slurm; return whether the tables and artifacts are right."""
    grid, plain, store = folder / "grid.yaml", folder / "plain", folder / "store"
    grid.write_text(GRID)
    run = [sys.executable, "-m", "jobs", "run", str(grid), "--store", str(plain)]
    subprocess.run(run, cwd=PROJECT, check=True, capture_output=True)
    count = len(made(plain))
    say(f"an undisturbed run made {count} artifacts")

    slurm = Slurm(folder, JOB_NODES + SPARE_NODES)
    try:
        slurm.start()
        words = ["sbatch", "--parsable", f"--nodes={JOB_NODES}", "--cpus-per-task=1"]
        number = slurm.call(*words, SCRIPT, grid, store).strip()
        wait_for(f"job {number} runs", lambda: slurm.job(number)["JobState"] == "RUNNING")
        kept = lose(slurm, number, store, -1, count // 6)
        kept |= lose(slurm, number, store, 0, count * 2 // 3)
        wait_for(
            "the job has ended",
            lambda: slurm.job(number)["JobState"] not in ("RUNNING", "COMPLETING"),
        )
        state = slurm.job(number)["JobState"]
        left = [process.cmdline() for process in slurm.of_jobs()]
    finally:
        slurm.end()
    now = made(store)
    repeated = sum(now.get(key) != when for key, when in kept.items())
    say(f"{state}; {repeated} finished artifacts made again; processes left: {left}")
    log = (folder / f"calprune-{number}.log").read_text()
    attempts = log.count(" artifacts of the store")  # which a run counts first
    say(f"the log has {attempts} attempts")
    equal = (store / "results/requeued.csv").read_bytes() == (
        plain / "results/requeued.csv"
    ).read_bytes()
    say("the tables are equal" if equal else "the tables differ")
    return equal and state == "COMPLETED" and attempts == 3 and not repeated and not left


def main() -> None:
    """Print what happened; exit code 1 if anything is wrong."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        raise SystemExit(0 if trial(Path(folder)) else 1)


if __name__ == "__main__":
    main()
