"""The command line: `python -m analysis report|compare|study`, installed as `calprune-analysis`."""

import sys
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.advice import advise
from analysis.compare import compare_grids
from analysis.labels import grid_notes, in_order
from analysis.load import TableError, load_results, load_texts
from analysis.metrics import heading
from analysis.report import chosen_reference, status_counts, write_report
from analysis.statistics import with_mean_accuracy
from analysis.studies import STUDIES
from analysis.study import Answer, Study, run_study, write_answer, write_page
from analysis.tables import TextTable, best_table, headline_metrics, level_table, limit_of

LOG_COLUMNS = 160
"""Width of tables in a file or a job's log."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Answers from a grid's results table.",
)


@app.command(name="report")
def report_grid(
    location: Annotated[
        str,
        typer.Argument(
            metavar="STORE_OR_PARQUET",
            help="A store's folder or fsspec URL, or one Parquet file.",
            show_default=False,
        ),
    ],
    grid: Annotated[str | None, typer.Option(help="Grid to report; default: the only one.")] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Calibration to compare with; default: the first, a corpus if there is one."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write; default: report/GRID in a local store, else in this folder."
        ),
    ] = None,
) -> None:
    """Print a grid's statistics; write its table, its figures and one self-contained page."""
    console = Console(width=None if sys.stdout.isatty() else LOG_COLUMNS)
    table = load_results(location, grid)
    name = _only_grid(table, location)
    label = chosen_reference(table, reference)
    note = None
    if reference is None and label is not None:
        note = "It is the first of the table; choose another with --reference."
    _print(console, name, table, label, note)
    folder = _default_output(location, name) if output is None else output
    page = write_report(table, folder, label, note, load_texts(location, name))
    for advice in advise(table):
        console.print(Text(str(advice), "bold"))
    for grid_note in grid_notes(table):
        console.print(grid_note, markup=False, highlight=False)
    console.print(f"report: {page}", soft_wrap=True, markup=False, highlight=False)


@app.command(name="compare")
def compare_two(
    first: Annotated[
        str,
        typer.Argument(
            metavar="FIRST",
            help="A store's folder or fsspec URL, or one Parquet file; the reference.",
            show_default=False,
        ),
    ],
    second: Annotated[
        str, typer.Argument(metavar="SECOND", help="The other one.", show_default=False)
    ],
    grid: Annotated[
        str | None, typer.Option(help="Grid of the first; default: the only one.")
    ] = None,
    other_grid: Annotated[
        str | None, typer.Option(help="Grid of the second; default: that of the first.")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder to write.", show_default="comparison in this folder")
    ] = Path("comparison"),
) -> None:
    """Compare two grids, or one grid in two stores: print what differs, and write a page.

    Cells are paired by model, pruner, sparsity, calibration and seed.
    """
    console = Console(width=None if sys.stdout.isatty() else LOG_COLUMNS)
    one = load_results(first, grid)
    name = _only_grid(one, first)
    other_name = other_grid or name
    other = load_results(second, other_name)
    names = (name, other_name) if name != other_name else (first, second)
    found = compare_grids(one, other, names)
    summary = found.summary
    page = write_report(found.table, output, found.first, " ".join(summary))
    for sentence in summary:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    for advice in advise(found.table):
        console.print(Text(str(advice), "bold"))
    _print_levels(console, found.table, found.first)
    console.print(f"comparison: {page}", soft_wrap=True, markup=False, highlight=False)


@app.command(name="study")
def answer_study(
    name: Annotated[str, typer.Argument(help="A study's name, or `all`.", show_default=False)],
    store: Annotated[
        str,
        typer.Option(
            envvar="CALPRUNE_STORE", help="A store's folder or fsspec URL, or one Parquet file."
        ),
    ] = ".calprune",
    grid: Annotated[
        str | None, typer.Option(help="Grid to read; default: the study's name.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write; default: studies in a local store, else in this folder."
        ),
    ] = None,
) -> None:
    """Answer a study's question from its grid's results: print the finding, draw its figure.

    Exit with 1 if results are missing; the message names the command that makes them.
    """
    console = Console(width=None if sys.stdout.isatty() else LOG_COLUMNS)
    if name != "all" and name not in STUDIES:
        raise TableError(f"no study is named {name}: name one of {', '.join(STUDIES)}, or all")
    if name == "all" and grid is not None:
        raise TableError("--grid: applies to one study, not to all: name the study")
    folder = _output_folder(store) / "studies" if output is None else output
    sections: list[tuple[Study, Answer | None]] = []
    for each in STUDIES.values() if name == "all" else [STUDIES[name]]:
        console.print(Text(f"{each.name}: {each.question}", "bold"))
        try:
            answer = run_study(each, store, grid)
        except TableError as error:
            sections.append((each, None))
            console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        else:
            sections.append((each, answer))
            console.print(answer.finding, markup=False, highlight=False)
            figure = write_answer(each, answer, folder)
            console.print(f"figure: {figure}", markup=False, highlight=False, soft_wrap=True)
        console.print()
    if name == "all":
        page = write_page(sections, folder)
        console.print(f"findings: {page}", markup=False, highlight=False, soft_wrap=True)
    if any(answer is None for _, answer in sections):
        raise typer.Exit(1)


def _only_grid(table: pd.DataFrame, location: str) -> str:
    grids = in_order(table["grid"])
    if len(grids) > 1:
        raise TableError(f"{location}: holds grids {', '.join(grids)}: choose one with --grid")
    return grids[0]


def _default_output(location: str, grid: str) -> Path:
    return _output_folder(location) / "report" / grid


def _output_folder(location: str) -> Path:
    """Return the folder of a local store, else the working folder."""
    in_store = "://" not in location and Path(location).is_dir()
    return Path(location) if in_store else Path()


def _print(
    console: Console, grid: str, table: pd.DataFrame, reference: str | None, note: str | None
) -> None:
    counts = ", ".join(f"{count} {status}" for status, count in status_counts(table).items())
    console.print(f"{grid}: {counts}", markup=False, highlight=False)
    if reference is None:
        console.print("no calibrated pruner has a result yet")
    else:
        line = f"reference calibration: {reference}. {note or ''}".rstrip()
        console.print(line, markup=False, highlight=False)
    _print_levels(console, table, reference)


def _print_levels(console: Console, table: pd.DataFrame, reference: str | None) -> None:
    shown = with_mean_accuracy(table)
    metrics = headline_metrics(shown)
    titles = {
        (task, metric): heading(task, metric, limit_of(shown, task)) for task, metric in metrics
    }
    for task, metric in metrics:
        console.print(_rich(titles[task, metric], level_table(shown, task, metric, reference)))
    for task, metric in metrics:
        if reference is not None:
            console.print(_rich(titles[task, metric], best_table(shown, task, metric, reference)))


def _rich(subject: str, table: TextTable) -> Table:
    rich_table = Table(title=Text(f"{subject}: {table.title}"), title_justify="left")
    for name in table.headings:
        rich_table.add_column(Text(name))
    for row in table.rows:
        rich_table.add_row(*(Text(entry.text, "bold" if entry.is_best else "") for entry in row))
    return rich_table


def main() -> None:
    """Run the command line; a user's mistake ends with exit code 2 and no traceback."""
    try:
        app()
    except (TableError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
