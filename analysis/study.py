"""A study: one question, the grid that answers it, and the finding."""

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from analysis.design import RecordedDesign, read_design
from analysis.figures import png_bytes, svg_bytes
from analysis.labels import grid_notes
from analysis.load import TableError, load_results
from analysis.metrics import effect_text, interval_text, level_text, p_text
from analysis.report import status_counts
from analysis.requests import load_requests


class Answer(NamedTuple):
    """What a study found."""

    what: str
    """The answer to the question, as far as the intervals support one."""

    size: str
    """The size of the effect."""

    certainty: str
    """How certain the answer is."""

    caveat: str
    """What could change it."""

    figure: Figure
    """Its canonical figure."""

    numbers: pd.DataFrame
    """The estimates in the figure and the text."""

    secondary: str = ""
    """The sizes of further effects."""

    @property
    def finding(self) -> str:
        """The finding as one line of text."""
        parts = (self.what, self.size, self.secondary, self.certainty, self.caveat)
        return " ".join(part for part in parts if part)

    @property
    def paragraph(self) -> str:
        """The finding in lines of at most 110 characters."""
        return _filled(self.finding)


class Results(NamedTuple):
    """What a grid has measured, and what it declared before."""

    table: pd.DataFrame
    """As `load_results` returns it."""

    design: RecordedDesign | None = None
    requests: pd.DataFrame | None = None
    """Results of single windows and questions of the compared cells, if the store has them."""


def _filled(text: str) -> str:
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)


class Study(NamedTuple):
    """One question.

    `name` is also the name of its grid and of its grid file.
    """

    name: str

    question: str
    contrast: str
    """The main comparison, chosen before any number was seen; others are secondary."""

    answer: Callable[[Results], Answer]
    """Raises `TableError` if results are missing."""

    @property
    def grid_file(self) -> Path:
        """Path of the grid file, relative if it lies below the working directory."""
        path = Path(__file__).parent / "studies" / f"{self.name}.yaml"
        return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def run_study(study: Study, location: str, grid: str | None = None) -> Answer:
    """Answer a study's question from a store's results or one Parquet file.

    Args:
        study: the study.
        location: a store's folder or fsspec URL, or one Parquet file.
        grid: name of the grid to read; default: the study's own.

    Raises:
        TableError: if results are missing; the message names the command that makes them.
    """
    remedy = f"make its results with `python -m jobs run {study.grid_file} --store {location}`"
    try:
        results = read_results(location, grid or study.name)
        answer = study.answer(results)
    except FileNotFoundError as error:
        raise TableError(f"study {study.name}: {location} has no results: {remedy}") from error
    except TableError as error:
        raise TableError(f"study {study.name}: {error}: {remedy}") from error
    further = [*grid_notes(results.table), _left_out(results.table)]
    return answer._replace(caveat=" ".join([answer.caveat, *further]).strip())


def read_results(location: str, grid: str) -> Results:
    """Read a grid's table and design, and the single windows of the cells that it compares.

    Args:
        location: a store's folder or fsspec URL, or one Parquet file.
        grid: the grid's name.
    """
    table = load_results(location, grid)
    design = read_design(location, grid)
    if design is None or location.endswith(".parquet"):
        return Results(table, design)
    try:
        return Results(table, design, load_requests(location, table))
    except TableError:  # a store may hold results alone; every interval says what it leaves out
        return Results(table, design)


def _left_out(table: pd.DataFrame) -> str:
    counts = status_counts(table)
    lost = [
        f"{counts[status]} {verb}"
        for status, verb in (("failed", "failed"), ("missing", "not run yet"))
        if counts[status]
    ]
    total = sum(counts.values())
    return f"Left out of {total} cells: {', '.join(lost)}." if lost else ""


def write_answer(study: Study, answer: Answer, folder: Path) -> Path:
    """Write `<name>.svg`, `<name>.png` and `<name>.csv`; return the path of the SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    figure = folder / f"{study.name}.svg"
    figure.write_bytes(svg_bytes(answer.figure))
    figure.with_suffix(".png").write_bytes(png_bytes(answer.figure))
    answer.numbers.to_csv(figure.with_suffix(".csv"), index=False, lineterminator="\n")
    return figure


def write_page(sections: Sequence[tuple[Study, Answer | None]], folder: Path) -> Path:
    """Write all findings to `<folder>.md`, beside the folder of their figures; return its path.

    Args:
        sections: each study with its answer, or None if it has no results.
        folder: folder of the figures.
    """
    page = folder.parent / f"{folder.name}.md"
    lines = [line for section in sections for line in _section(*section, folder.name)]
    page.write_text("\n".join([*HEAD, *lines]), encoding="utf-8")
    return page


HEAD = (
    "# Findings",
    "",
    "What the studies' grids show, as `python -m analysis study all` writes it. The two commands",
    "below a finding reproduce it. `docs/studies.md` explains how a finding is made. Levels are",
    "of both sides, then of the dense model: perplexities, unless a contrast says otherwise.",
    "",
)


def _section(study: Study, answer: Answer | None, folder: str) -> list[str]:
    grid = f"analysis/studies/{study.name}.yaml"
    head = [f"## {study.name}", "", f"**{study.question}** Main contrast: {study.contrast}.", ""]
    commands = [
        "```",
        f"python -m jobs run {grid} --store .calprune",
        f"python -m analysis study {study.name} --store .calprune",
        "```",
        "",
    ]
    if answer is None:
        return [*head, "Not run.", "", *commands]
    figure = f"![{study.question}]({folder}/{study.name}.svg)"
    if "verdict" not in answer.numbers:
        return [*head, answer.paragraph, "", figure, "", *commands]
    rest = f"{answer.certainty} {answer.caveat}"
    table = _contrasts_table(answer.numbers)
    return [*head, _filled(answer.what), "", *table, "", _filled(rest), "", figure, "", *commands]


def _contrasts_table(numbers: pd.DataFrame) -> list[str]:
    """Return the judged contrasts as lines of a Markdown table."""
    lines = [
        "| contrast | change | 95 % interval | p | levels, dense | verdict |",
        "|---" * 6 + "|",
    ]
    for row in numbers[numbers["family_size"].notna()].to_dict("records"):
        unit = str(row["unit"])
        change = effect_text(row["effect"], math.nan, math.nan, unit)
        interval = interval_text(row["low"], row["high"], unit)
        levels = [level_text(row[name], unit) for name in ("level", "level_against")]
        shown = " against ".join(levels)
        dense = row["level_dense"]
        shown += "" if math.isnan(dense) else f", {level_text(dense, unit)}"
        verdict = "; ".join(each for each in (row["verdict"], row["remarks"]) if each)
        cells = [row["what"], change, interval, p_text(row["p"]), shown, verdict]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines
