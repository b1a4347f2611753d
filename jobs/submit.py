"""Send a grid to a cluster as a job: its code, the grid file and the files that it names."""

import glob
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

import cluster
import jobs
import pipeline
from cluster.credentials import enclose_credentials
from cluster.submission import Client, submit_job
from jobs.grid import Grid, read_grid
from jobs.outside import Outside, outside
from jobs.plan import make_plan
from pipeline.errors import InputError

GRID_FILE = "grid.yaml"
"""What the grid file is called in the job's working directory."""

PACKAGE = "calprune"


def submit_grid(
    client: Client,
    path: Path,
    store: str,
    *,
    workers: int | None = None,
    extras: Sequence[str] = (),
    variables: Sequence[str] = (),
) -> str:
    """Start a grid on a cluster; returns the job's name.

    Args:
        extras: calprune's extras to install for the job, in the versions that are installed here.
        variables: names of environment variables whose values the job is to have.

    Raises:
        InputError: if the grid has a mistake that can be seen from here, a file, a variable or an
            extra is not there, or a model's dtype would depend on which CPU reads the grid.
        JobServerError: if the server refuses it.
    """
    grid = read_grid(path)
    make_plan(grid)
    _refuse_dtypes_of_this_cpu(grid)
    values = {name: _value(name) for name in variables}
    requirements = [pinned for extra in extras for pinned in pinned_extra(extra)]
    job = f"{grid.name}-{uuid.uuid4().hex[:8]}"
    words = ["python", "-m", "jobs", "run", GRID_FILE, "--store", store]
    if workers is not None:
        words += ["--workers", str(workers)]
    with tempfile.TemporaryDirectory(prefix="calprune-job-") as name:
        folder = Path(name)
        pack(grid, path, folder)
        if values:
            enclose_credentials(folder, values)
        submit_job(client, job, words, folder, requirements)
    return job


def pack(grid: Grid, path: Path, folder: Path) -> None:
    """Fill a job's working directory: code, grid file, and files named by a relative path.

    Raises:
        InputError: if there is no such file, or it is not below the present folder.
    """
    for module in (pipeline, cluster, jobs):
        source = Path(str(module.__file__)).parent
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, folder / module.__name__, ignore=ignored)
    # Nodes that have only what calprune needs, and not calprune, learn its version from this.
    installed = metadata.distribution(PACKAGE)
    about = folder / f"{PACKAGE}-{installed.version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        installed.read_text("METADATA") or installed.read_text("PKG-INFO") or ""
    )
    for taken in outside(grid):
        _pack_files(taken, folder)
    shutil.copyfile(path, folder / GRID_FILE)


def pinned_extra(extra: str) -> list[str]:
    """The packages of an extra of calprune, in the versions that are installed here.

    Raises:
        InputError: if there is no such extra, or it is not installed.
    """
    known = metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    if extra not in known:
        raise InputError("extra", extra, f"known are {', '.join(sorted(known))}")
    pinned = []
    for line in metadata.requires(PACKAGE) or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if (
            marker is None
            or marker.evaluate({"extra": ""})
            or not marker.evaluate({"extra": extra})
        ):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError as error:
            remedy = f"install {PACKAGE}[{extra}] here, so that the job gets the same versions"
            raise InputError("extra", extra, remedy) from error
        pinned.append(f"{requirement.name}=={version}")
    return pinned


def _value(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        # It may be a secret: not shown.
        raise InputError("env", "...", "give the name of a variable alone; its value is read here")
    if name not in os.environ:
        raise InputError("env", name, "is not set here; set it, or leave it out")
    return os.environ[name]


def _refuse_dtypes_of_this_cpu(grid: Grid) -> None:
    """The job would settle `auto` by the CPU of the node that it starts on, and `show` here by
    this one: two dtypes are two sets of keys."""
    for name, chosen in grid.auto_dtypes.items():
        if not chosen.on_gpus:
            remedy = (
                "depends on the CPU that reads the grid, and the cluster's may be another: write "
                "bfloat16 or float32, or give the stages their GPUs in resources"
            )
            raise InputError(f"models.{name}.dtype", "auto", remedy)


def _pack_files(taken: Outside, folder: Path) -> None:
    """Copy what has a relative path; all nodes must reach an absolute one or a URL."""
    for pattern in taken.paths:
        if "://" in pattern or Path(pattern).is_absolute():
            continue
        matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
        if not matches:
            raise InputError(
                taken.field,
                pattern,
                "is not here; give a path below this folder, which goes along with the "
                "job, or an absolute path or URL that every node reaches",
            )
        for match in matches:
            if ".." in match.parts:
                remedy = (
                    "leads out of this folder; go to one above it, or give an absolute path or URL"
                )
                raise InputError(taken.field, pattern, remedy)
            target = folder / match
            target.parent.mkdir(parents=True, exist_ok=True)
            if match.is_dir():
                shutil.copytree(match, target, dirs_exist_ok=True)
            else:
                shutil.copyfile(match, target)
