"""What the repository's pages link to and name is there."""

import re
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/**/*.md"))
)
FOLDERS = sorted(path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "build")


@cache
def parsed(page: Path) -> list[Token]:
    """Its tokens, those inside of paragraphs, tables and headings among them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    return [inner for token in tokens for inner in (token, *(token.children or ()))]


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and the site make them."""
    tokens = parsed(page)
    titles = [
        "".join(part.content for part in tokens[place + 1].children or ())
        for place, token in enumerate(tokens)
        if token.type == "heading_open"
    ]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def targets(page: Path) -> list[str]:
    """Where its links and pictures point, without those to other places of the net."""
    found = [str(token.attrGet("href") or token.attrGet("src") or "") for token in parsed(page)]
    return [target for target in found if target and not re.match(r"[a-z]+:", target)]


@pytest.mark.parametrize("name", PAGES)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(name: str) -> None:
    dead = []
    for target in targets(ROOT / name):
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        inside = file.resolve().is_relative_to(ROOT) and file.exists()
        if not inside or (anchor and anchor not in anchors(file)):
            dead.append(target)
    assert dead == []


@pytest.mark.parametrize("name", sorted({*PAGES} - {"CHANGELOG.md"}))
def test_every_path_that_a_page_names_is_there(name: str) -> None:
    code = [token.content for token in parsed(ROOT / name) if token.type == "code_inline"]
    path = re.compile(rf"({'|'.join(map(re.escape, FOLDERS))})/[\w/.*-]*")
    named = [each for each in code if path.fullmatch(each)]
    assert [each for each in named if not list(ROOT.glob(each))] == []


def test_every_page_is_in_the_sites_navigation() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    in_docs = {str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/**/*.md")}
    of_the_root = {"index.md", "contributing.md", "reporting.md", "changelog.md"}
    made_by_the_hook = {"api", "examples", "notebooks"}
    assert sorted(leaves(site["nav"])) == sorted(in_docs | of_the_root | made_by_the_hook)


def test_every_module_has_a_page_in_the_sites_navigation() -> None:
    pages = runpy.run_path(str(ROOT / "docs/site/pages.py"))
    modules = {
        f"api/{path.relative_to(ROOT).with_suffix('.md')}"
        for package in ("pipeline", "cluster", "jobs", "analysis")
        for path in ROOT.glob(f"{package}/**/[!_]*.py")
        if "notebooks" not in path.parts
    }
    written = pages["_api_pages"]()
    assert {name for name in written if not name.endswith("index.md")} == modules
    assert sorted(leaves(pages["_api_nav"]())) == sorted(written)


def leaves(nav: Any) -> list[str]:
    """The pages of a navigation, whatever its depth."""
    if isinstance(nav, str):
        return [nav]
    below = nav.values() if isinstance(nav, dict) else nav
    return [page for each in below for page in leaves(each)]


def test_the_hooks_before_a_commit_are_the_commands_of_make_check() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert recipe is not None
    checks = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    commands = [check.removesuffix(" .").removesuffix(" --check") for check in checks]
    assert [hook["entry"] for hook in hooks] == commands


def test_ci_runs_the_test_command_and_builds_the_site() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yaml").read_text())["jobs"]
    commands = {name: [step.get("run") for step in job["steps"]] for name, job in jobs.items()}
    assert ".ci/run" in commands["test"]
    assert "make docs" in commands["docs"]
