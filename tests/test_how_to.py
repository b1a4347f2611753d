"""Each page of `docs/how-to` is followed to the letter, in a copy of the project in which somebody
has followed it before, with other names.

A code block with a title is a file to write, or, as a diff, lines to add to one. The commands of a
block marked `sh` are run; those of other blocks take minutes, or a cluster.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs/how-to").glob("*.md"))
COPIED = ("pipeline", "cluster", "jobs", "analysis", "docs", "tests", "pyproject.toml")

NAMES = {
    "deviation": "variation",
    "frequencies": "occurrences",
    "pattern": "fashion",
    "stories": "letters",
}
"""What each page adds, and what was added before; of one length, so that lines keep theirs."""


class Step(NamedTuple):
    """A code block of a page."""

    language: str
    file: str
    """Where it goes; empty for commands and their output."""
    content: str


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
def test_the_steps_of_a_page_work_as_they_stand_after_others_of_the_kind(
    page: Path, project: Path
) -> None:
    text = page.read_text(encoding="utf-8")
    for step in steps(with_other_names(text)):
        write(step, project)
    commands = [step for step in steps(text) if step.language == "sh"]
    assert commands
    for step in steps(text):
        write(step, project)
        if step in commands:
            run(step.content, project)
    files = {step.file: step.language for step in steps(text) if step.file.endswith(".py")}
    changed = " ".join(file for file, language in files.items() if language == "diff")
    written = " ".join(files)
    run(f"ruff check --quiet --fix --select I,RUF022 {changed}", project)
    run(f"ruff check {written}\nruff format --check {written}", project)


def test_the_code_of_all_pages_has_the_right_types(project: Path) -> None:
    if (ROOT / ".mypy_cache").is_dir():  # without it mypy takes a minute
        shutil.copytree(ROOT / ".mypy_cache", project / ".mypy_cache")
    for page in PAGES:
        for step in steps(page.read_text(encoding="utf-8")):
            write(step, project)
    run("mypy --package pipeline --package jobs --package analysis", project)


def test_lines_are_added_below_the_line_that_the_diff_names(tmp_path: Path) -> None:
    file = tmp_path / "lists.py"
    file.write_text("one = [\n    1,\n    3,\n]\ntwo = [\n    1,\n    3,\n]\n")
    change(file, "@@ two = [\n     1,\n+    2,\n@@ one = [\n+    0,\n     1,\n")
    assert (
        file.read_text()
        == "one = [\n    0,\n    1,\n    3,\n]\ntwo = [\n    1,\n    2,\n    3,\n]\n"
    )
    with pytest.raises(AssertionError, match="has this line 2 times"):
        change(file, "     3,\n+    4,\n")
    with pytest.raises(AssertionError, match="one line that stays"):
        change(file, "@@ one = [\n     1,\n     3,\n+    4,\n")


def steps(page: str) -> Iterator[Step]:
    """Yield the code blocks of a page."""
    for block in MarkdownIt("commonmark").parse(page):
        language, _, title = block.info.partition(" ")
        if language:
            yield Step(language, title.removeprefix("title=").strip('"'), block.content)


def with_other_names(page: str) -> str:
    """Return the page with what it adds renamed.

    A class has one line `left_out_at_default`, and whoever adds a second field changes that line.
    """
    for name, other in NAMES.items():
        page = page.replace(name, other).replace(name.capitalize(), other.capitalize())
    return "\n".join(line for line in page.split("\n") if "left_out_at_default: " not in line)


def write(step: Step, project: Path) -> None:
    """Write the file of a step, or change it."""
    path = project / step.file
    if step.language == "diff":
        change(path, step.content)
    elif step.file:
        assert not path.exists(), f"{step.file} is there already: show a diff"
        path.write_text(step.content, encoding="utf-8")


def change(path: Path, diff: str) -> None:
    """Add the lines with a `+` before or after the line that stays, below the line after `@@`.

    A second line that stays would break as soon as somebody added one between the two.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    for hunk in f"\n{diff}".split("\n@@ "):
        section, _, body = hunk.partition("\n")
        if not body:  # the diff begins with @@
            continue
        stays = [line for line in body.splitlines() if not line.startswith("+")]
        assert [line[:1] for line in stays] == [" "], f"show one line that stays, not {stays}"
        line = stays[0][1:]
        start = place(lines, section, path) if section else place(lines, line, path)
        assert line in lines[start:], f"{path.name} lacks this line below {section}: {line}"
        at = lines.index(line, start)
        lines[at : at + 1] = [each[1:] for each in body.splitlines()]
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


def place(lines: list[str], line: str, path: Path) -> int:
    """Return where a line is that a file has once."""
    assert lines.count(line) == 1, f"{path.name} has this line {lines.count(line)} times: {line}"
    return lines.index(line)


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
