"""The site's pages that are no file of `docs/`: the root's, the notebooks', the API's.

mkdocs calls the functions whose names begin with `on_`. A new module or notebook gets its page by
itself.
"""

import ast
import base64
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "reporting.md",  # docs/security.md has the name
    "CHANGELOG.md": "changelog.md",
}
EXAMPLES = {
    f"examples/{path.name}": f"examples/{path.stem}.md" for path in ROOT.glob("examples/*.*")
}
LINKED = {**ROOT_PAGES, **EXAMPLES}
"""Files outside `docs/` that pages may link to, and their pages."""

PACKAGES = ("pipeline", "cluster", "jobs", "analysis")
NOTEBOOKS = ROOT / "analysis/notebooks"
DEMOS = ("demo", "demo-testbed")
"""Grids that the first notebook is executed with, the first that the store holds."""

Nav = list[str | dict[str, Any]]


def on_config(config: Any) -> Any:
    """Put the list of pages where `mkdocs.yml` names `examples`, `notebooks` and `api`."""
    from pymdownx.slugs import slugify

    lists = {"examples": sorted(EXAMPLES.values()), "notebooks": _notebook_nav(), "api": _api_nav()}
    for section in config.nav:
        for pages in section.values():
            for place, page in enumerate(pages):
                if isinstance(page, dict):
                    pages[place] = {title: lists[name] for title, name in page.items()}
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")  # anchors as GitHub makes them
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages, and point links that leave `docs/` to them."""
    from mkdocs.structure.files import File

    pages = {**_root_pages(), **_example_pages(), **_api_pages()}
    for notebook in sorted(NOTEBOOKS.glob("*.py")):
        pages |= _notebook_pages(notebook, os.environ.get("STORE", ".calprune"))
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Link the modules that a page names, and pages at the root of the repository."""
    up = "../" * page.file.src_uri.count("/")
    for source, name in LINKED.items():
        markdown = markdown.replace(f"](../{up}{source}", f"]({up}{name}")
    modules = {str(path.relative_to(ROOT)): _api_name(path) for path in _modules()}

    def link(match: re.Match[str]) -> str:
        name = modules.get(match[1])
        return f"[{match[0]}]({up}{name})" if name else match[0]

    return re.sub(r"(?<![`\[])`([\w/]+\.py)`(?!`)", link, markdown)


def _root_pages() -> dict[str, str]:
    """The root's pages with links that hold in the site, named by their pages' titles."""

    def named(match: re.Match[str]) -> str:
        return f"[{_title(ROOT / 'docs' / match[1])}]({match[1]}"

    pages = {}
    for source, name in ROOT_PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = re.sub(r"\[docs/([\w/-]+\.md)\]\(docs/[\w/-]+\.md", named, text)
        text = text.replace("](docs/", "](")
        for other, there in LINKED.items():
            text = text.replace(f"]({other}", f"]({there}")
        pages[name] = text
    return pages


def _example_pages() -> dict[str, str]:
    return {
        name: f"# {source}\n\n```{Path(source).suffix[1:]}\n{(ROOT / source).read_text()}```\n"
        for source, name in EXAMPLES.items()
    }


def _title(page: Path) -> str:
    return page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


# The API, a page a module


def _modules() -> Iterator[Path]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if NOTEBOOKS not in path.parents and path.name not in ("__init__.py", "__main__.py"):
                yield path


def _rooms() -> list[Path]:
    """The packages and the folders in them that hold modules, from the top down."""
    found = {path.parent for path in _modules()}
    return sorted(found | {ROOT / package for package in PACKAGES})


def _dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def _api_name(path: Path) -> str:
    return f"api/{path.relative_to(ROOT).with_suffix('')}.md"


def _api_nav() -> Nav:
    def room(folder: Path) -> Nav:
        below = [other for other in _rooms() if other.parent == folder]
        return [
            f"api/{folder.relative_to(ROOT)}/index.md",
            *({other.name: room(other)} for other in below),
            *({path.stem: _api_name(path)} for path in _modules() if path.parent == folder),
        ]

    return ["api/index.md", *({package: room(ROOT / package)} for package in PACKAGES)]


def _api_pages() -> dict[str, str]:
    pages = {_api_name(path): f"::: {_dotted(path)}\n" for path in _modules()}
    everything = ["# API", "", "From the docstrings, a page a module.", ""]
    for room in _rooms():
        name, folder = _dotted(room), room.relative_to(ROOT)
        head = f"---\ntitle: {name}\n---\n\n"
        head += f"::: {name}" if (room / "__init__.py").exists() else f"# {name}"
        below = [
            f"[`{each.name}`]({each.name}/index.md)" for each in _rooms() if each.parent == room
        ]
        rooms = f"Rooms: {', '.join(below)}.\n\n" if below else ""
        pages[f"api/{folder}/index.md"] = f"{head}\n\n{rooms}{_table(room, '')}"
        everything += [f"## [`{name}`]({folder}/index.md)", "", _table(room, f"{folder}/")]
    pages["api/index.md"] = "\n".join(everything)
    return pages


def _table(room: Path, way: str) -> str:
    """The room's modules, each with the first sentence of its docstring."""
    rows = [
        f"| [`{path.stem}`]({way}{path.stem}.md) | {_first_line(path)} |"
        for path in _modules()
        if path.parent == room
    ]
    return "\n".join(["| module | |", "|---|---|", *rows, ""])


def _first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split()).replace("|", "\\|")


# The notebooks, executed where the store holds their results, and kept with their output


def _notebook_nav() -> Nav:
    others = sorted(path.stem for path in NOTEBOOKS.glob("*.py") if path.stem != "start")
    return [{stem.replace("_", "-"): f"notebooks/{stem}.md"} for stem in ("start", *others)]


def _notebook_pages(path: Path, store: str) -> dict[str, str | bytes]:
    """The notebook's page and its figures."""
    import jupytext

    grids = DEMOS if path.stem == "start" else (path.stem.replace("_", "-"),)
    made = [grid for grid in grids if (ROOT / store / "results" / f"{grid}.parquet").exists()]
    notebook = jupytext.read(path)
    if made:
        _execute(notebook, store, made[0])
    if made[:1] == [grids[0]]:
        _keep(notebook, path.with_suffix(".ipynb"))
    return _as_markdown(notebook, path.stem, "" if made else _not_executed(grids[-1]))


def _execute(notebook: Any, store: str, grid: str) -> None:
    """Run all cells from the repository's root; raises where a cell does."""
    from nbclient import NotebookClient

    settings = {"CALPRUNE_STORE": store, "CALPRUNE_GRID": grid}
    client = NotebookClient(
        notebook,
        timeout=600,
        resources={"metadata": {"path": str(ROOT)}},
        record_timing=False,
        coalesce_streams=True,  # how printed lines arrive depends on timing
    )
    client.execute(env={**os.environ, **settings})


def _keep(notebook: Any, path: Path) -> None:
    """Write the notebook with its output; equal output gives equal bytes."""
    import nbformat

    for place, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{place}"  # jupytext draws one
    del notebook.metadata["language_info"]  # the version of Python
    nbformat.write(notebook, path)


def _not_executed(grid: str) -> str:
    study = (ROOT / f"docs/findings/{grid}.svg").exists()
    file = f"analysis/studies/{grid}.yaml" if study else f"jobs/grids/{grid}.yaml"
    picture = f"\n\n![The study's finding](../findings/{grid}.svg)" if study else ""
    return (
        "*Shown without output: the store that this site was built with has no results of the "
        f"grid `{grid}`. Run `python -m jobs run {file}`, then `make docs`.*{picture}"
    )


def _as_markdown(notebook: Any, stem: str, note: str) -> dict[str, str | bytes]:
    parts: list[str] = []
    pages: dict[str, str | bytes] = {}
    for cell in notebook.cells:
        parts.append(
            cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```"
        )
        if note and len(parts) == 1:
            parts.append(note)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                figure = f"{stem}-{len(pages) + 1}.png"
                pages[f"notebooks/{figure}"] = base64.b64decode(data["image/png"])
                width = output["metadata"]["image/png"]["width"]
                parts.append(f'<img src="{figure}" alt="Figure {len(pages)}" width="{width}">')
            elif "text/html" in data:
                parts.append(f'<div class="output">{_one_block(data["text/html"])}</div>')
            else:
                text = output.get("text") or data.get("text/plain", "")
                aligned = "  " in text  # a table, whose lines stay whole
                parts.append(f"```{'text' if aligned else '{.text .prose}'}\n{text.rstrip()}\n```")
    pages[f"notebooks/{stem}.md"] = "\n\n".join(parts) + "\n"
    return pages


def _one_block(html: str) -> str:
    """HTML without empty lines, which would end it in Markdown, and without pandas' own looks."""
    html = re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL)
    html = re.sub(r"<table[^>]*>", "<table>", html)
    return "\n".join(line for line in html.splitlines() if line.strip())
