"""Each page of `docs/how-to` is followed to the letter, in a copy of the project.

A code block with a title is a file to write, or, as a diff, lines to add to one. The commands of a
block marked `sh` are run; those of other blocks take minutes, or a cluster.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs/how-to").glob("*.md"))
COPIED = ("pipeline", "cluster", "jobs", "analysis", "docs", "tests", "pyproject.toml")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy to change."""
    leave_out = shutil.ignore_patterns("__pycache__")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=leave_out)
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_steps_of_a_page_work_as_they_stand(page: Path, project: Path) -> None:
    commands = 0
    modules: set[str] = set()
    for block in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
        language, _, title = block.info.partition(" ")
        name = title.removeprefix("title=").strip('"')
        modules |= {name} if name.endswith(".py") else set()
        if language == "diff":
            change(project / name, block.content)
        elif name:
            assert not (project / name).exists(), f"{name} is there already: show a diff"
            (project / name).write_text(block.content, encoding="utf-8")
        elif language == "sh":
            commands += 1
            run(block.content, project)
    assert commands
    written = " ".join(sorted(modules))
    run(f"ruff check {written}\nruff format --check {written}", project)


def change(path: Path, diff: str) -> None:
    """Replace the lines of a diff with a blank or `-` by those with a blank or `+`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    old = [line[1:] for line in diff.splitlines() if not line.startswith("+")]
    new = [line[1:] for line in diff.splitlines() if not line.startswith("-")]
    places = [at for at in range(len(lines)) if lines[at : at + len(old)] == old]
    assert len(places) == 1, f"{path.name} has these lines {len(places)} times: {old}"
    lines[places[0] : places[0] + len(old)] = new
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


def run(commands: str, project: Path) -> None:
    """Run commands as with the environment activated, and without a network."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"PATH": path, "PYTHONPATH": str(project), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-euc", commands],
        cwd=project,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
