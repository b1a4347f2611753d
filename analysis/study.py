"""A study: one question, the grid that answers it, and what the numbers say."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures import png_bytes, svg_bytes
from analysis.load import TableError, load_results
from analysis.report import status_counts


class Answer(NamedTuple):
    """What a study found."""

    what: str
    """The answer to its question, as far as the intervals support one."""

    size: str
    """How large the effect is."""

    certainty: str
    """How sure that is."""

    caveat: str
    """What would change it."""

    figure: Figure
    """Its canonical figure."""

    numbers: pd.DataFrame
    """What the figure and the words rest on."""

    @property
    def finding(self) -> str:
        """One paragraph."""
        return " ".join((self.what, self.size, self.certainty, self.caveat)).replace("  ", " ")

    @property
    def paragraph(self) -> str:
        """The finding in lines of 110 characters at the most."""
        return textwrap.fill(self.finding, 110, break_long_words=False)


class Study(NamedTuple):
    """One question."""

    name: str
    """Also its grid's name, and that of its grid file beside its module."""

    question: str
    contrast: str
    """The one comparison that was chosen before any number was seen; others are secondary."""

    answer: Callable[[pd.DataFrame], Answer]
    """From the grid's results table, as `load_results` gives it.

    Raises `TableError` if the table holds too little."""

    @property
    def grid_file(self) -> Path:
        """Below the working directory if it is there."""
        path = Path(__file__).parent / "studies" / f"{self.name}.yaml"
        return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def run_study(study: Study, location: str, grid: str | None = None) -> Answer:
    """Answer a study's question from a store's results or one Parquet file.

    Args:
        grid: the name of the grid to read, if not the study's own.

    Raises:
        TableError: if its results are not there, or too few; the message says what makes them.
    """
    remedy = f"make its results with `python -m jobs run {study.grid_file} --store {location}`"
    try:
        table = load_results(location, grid or study.name)
        answer = study.answer(table)
    except FileNotFoundError as error:
        raise TableError(f"study {study.name}: {location} has none of it: {remedy}") from error
    except TableError as error:
        raise TableError(f"study {study.name}: {error}: {remedy}") from error
    return answer._replace(caveat=" ".join([answer.caveat, _left_out(table)]).strip())


def _left_out(table: pd.DataFrame) -> str:
    counts = status_counts(table)
    lost = [
        f"{counts[status]} {verb}"
        for status, verb in (("failed", "failed"), ("missing", "have not run yet"))
        if counts[status]
    ]
    total = sum(counts.values())
    return f"Of {total} cells {' and '.join(lost)}: they are left out." if lost else ""


def write_answer(study: Study, answer: Answer, folder: Path) -> Path:
    """Write `<name>.svg`, `<name>.png` and `<name>.csv`; returns the first one's path."""
    folder.mkdir(parents=True, exist_ok=True)
    figure = folder / f"{study.name}.svg"
    figure.write_bytes(svg_bytes(answer.figure))
    figure.with_suffix(".png").write_bytes(png_bytes(answer.figure))
    answer.numbers.to_csv(figure.with_suffix(".csv"), index=False, lineterminator="\n")
    return figure


def write_page(sections: Sequence[tuple[Study, Answer | None]], folder: Path) -> Path:
    """Write all findings beside the folder of their figures, as `<folder>.md`; returns its path.

    Args:
        sections: each study, with None where its results are not there.
    """
    page = folder.parent / f"{folder.name}.md"
    told = [text for section in sections for text in _section(*section, folder.name)]
    page.write_text("\n".join([*HEAD, *told]), encoding="utf-8")
    return page


HEAD = (
    "# Findings",
    "",
    "What the studies' grids gave, as `python -m analysis study all` tells it. Each is made again",
    "by the two commands below it. `docs/studies.md` says how a finding is made.",
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
    return [
        *head,
        answer.paragraph,
        "",
        figure,
        "",
        *commands,
    ]
