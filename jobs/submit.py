"""Send a grid to a cluster as a job, with its code and the files that it names."""

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
"""Name of the grid file in the job's working directory."""

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
    """Start a grid on a cluster, and return the job's name.

    Args:
        extras: calprune's extras to install for the job, in the versions installed here.
        variables: names of environment variables to pass to the job.

    Raises:
        InputError: if this machine finds a mistake in the grid, a file, a variable or an extra is
            missing, or a model's dtype would depend on the CPU that reads the grid.
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
    """Fill a job's working directory with the code, the grid file and all files named by relative
    paths.

    Raises:
        InputError: if a file is missing, or not below the current folder.
    """
    for module in (pipeline, cluster, jobs):
        source = Path(str(module.__file__)).parent
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, folder / module.__name__, ignore=ignored)
    # On nodes without calprune itself this states its version.
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
    """Return the packages of an extra of calprune, in the versions installed here.

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
        # Not shown: it may be a secret.
        raise InputError("env", "...", "give only the name of a variable; its value is read here")
    if name not in os.environ:
        raise InputError("env", name, "is not set here; set it, or leave it out")
    return os.environ[name]


def _refuse_dtypes_of_this_cpu(grid: Grid) -> None:
    """Check that no model has `dtype: auto` without GPUs: the job would choose by its node's CPU
    and `show` by this one, and two dtypes are two sets of keys."""
    for name, chosen in grid.auto_dtypes.items():
        if not chosen.on_gpus:
            remedy = (
                "depends on the CPU that reads the grid, and the cluster's may differ: write "
                "bfloat16 or float32, or give the stages their GPUs in resources"
            )
            raise InputError(f"models.{name}.dtype", "auto", remedy)


def _pack_files(taken: Outside, folder: Path) -> None:
    """Copy files with a relative path; nodes reach absolute paths and URLs themselves."""
    for pattern in taken.paths:
        if "://" in pattern or Path(pattern).is_absolute():
            continue
        matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
        if not matches:
            raise InputError(
                taken.field,
                pattern,
                "does not exist here; give a path below this folder, whose files go with the "
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
