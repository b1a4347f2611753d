"""A grid's results as a folder: the table, its figures, and one self-contained page."""

import base64
import gzip
import hashlib
import json
import re
from collections import defaultdict
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import jinja2
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.advice import Advice, advise
from analysis.cell_pages import cell_pages
from analysis.figures import difference_figure, png_bytes, sparsity_figure, svg_bytes
from analysis.labels import DENSE, NO_CALIBRATION, grid_notes, in_order
from analysis.load import Texts
from analysis.metrics import effect_text, heading
from analysis.overview import overview_figure
from analysis.statistics import (
    compare_with_reference,
    measured,
    reference_label,
    with_mean_accuracy,
)
from analysis.tables import (
    Entry,
    TextTable,
    all_metrics,
    best_table,
    cell_table,
    headline_metrics,
    level_table,
    limit_of,
    paper_layout,
    retention_table,
)

LONG_COLUMNS = ["traceback", "note", "versions", "lineage", "prune_report"]
"""Left out of `table.csv`."""

SURE = 0.05
"""An effect is called sure if its corrected p is below this."""


PICTURES = 40
"""The most figures of a report: more would make it slow to write and to open."""

CSS_DPI = 96
"""CSS pixels in an inch."""

ROWS = 50
"""Rows of a table that are HTML. The page's script shows the others while the reader scrolls."""

ERROR_LETTERS = 100
"""Of an error in a table; the cell's page has all of it."""


class Picture(NamedTuple):
    """A figure on the page."""

    number: int
    """Its place in the page's data."""
    description: str
    width: int
    """In CSS pixels; with the height it keeps the figure's place until it is drawn."""
    height: int


class Section(NamedTuple):
    """The page's section on one metric of one task."""

    title: str
    anchor: str
    name: str
    findings: list[str]
    best: TextTable | None
    pictures: list[Picture]
    undrawn: int
    """Figures that were left out, since the report has too many."""
    levels: TextTable


class Opening(NamedTuple):
    """The first section of the page."""

    advice: list[Advice]
    pictures: list[Picture]
    notes: list[str]
    """The grid's notes to readers."""


class Gallery:
    """The figures of a report: files in a folder, and the SVG texts for the page's data."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.drawn: list[str] = []

    def has_room(self, count: int) -> bool:
        """Return whether the report may have so many more figures."""
        return len(self.drawn) + count <= PICTURES

    def add(self, figure: Figure, name: str, description: str) -> Picture:
        """Write a figure as SVG and PNG, and keep its SVG for the page."""
        vector = svg_bytes(figure)
        (self._folder / f"{name}.svg").write_bytes(vector)
        (self._folder / f"{name}.png").write_bytes(png_bytes(figure))
        self.drawn.append(vector.decode())
        width, height = (round(CSS_DPI * inches) for inches in figure.get_size_inches())
        return Picture(len(self.drawn) - 1, description, width, height)


def chosen_reference(table: pd.DataFrame, reference: str | None) -> str | None:
    """Return the label of the calibration that others are compared with.

    By default it is the first one; it is None if no calibrated pruner has a result.

    Raises:
        TableError: if there is no such calibration.
    """
    if reference is not None:
        return reference_label(table, reference)
    rows = measured(table)
    return next(iter(in_order(rows.loc[rows["calibration"] != NO_CALIBRATION, "source"])), None)


def write_report(
    table: pd.DataFrame,
    output: Path,
    reference: str | None,
    note: str | None = None,
    texts: Texts | None = None,
) -> Path:
    """Write `table.csv`, `figures/` in PNG and SVG, and `index.html`, which needs no other file.

    Equal tables give equal bytes. A page that the same code made from the same table is left as it
    is. A report has at most `PICTURES` figures, those of the main metrics first.

    Args:
        table: one grid's results as `load_results` returns them.
        output: folder to write.
        reference: a label in `source`; None if no calibrated pruner has a result.
        note: a remark for the top of the page.
        texts: what the grid's models wrote from one prompt.

    Returns:
        The page's path.
    """
    figures = output / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    page = output / "index.html"
    fingerprint = _fingerprint(table, reference, note, texts)
    if page.is_file() and f'content="{fingerprint}"' in page.read_text(encoding="utf-8"):
        return page
    short = table.drop(columns=LONG_COLUMNS)
    short.to_csv(output / "table.csv", index=False, lineterminator="\n")
    shown = with_mean_accuracy(table)
    metrics = dict.fromkeys([*headline_metrics(shown), *all_metrics(shown)])
    gallery = Gallery(figures)
    opening = _opening(table, gallery)
    sections = [_section(shown, task, metric, reference, gallery) for task, metric in metrics]
    html = _page(table, opening, sections, gallery, reference, note, texts, fingerprint)
    page.write_text(html, encoding="utf-8")  # last: a page means that the folder is complete
    return page


def _fingerprint(
    table: pd.DataFrame, reference: str | None, note: str | None, texts: Texts | None
) -> str:
    """Return the SHA-256 of the table, the arguments and the code that a report is made from."""
    digest = hashlib.sha256(table.to_json(orient="split", default_handler=str).encode())
    digest.update(json.dumps([reference, note, texts, matplotlib.__version__]).encode())
    for source in sorted(Path(__file__).parent.glob("*")):
        if source.suffix in (".py", ".html", ".csv"):
            digest.update(source.read_bytes())
    return digest.hexdigest()


def _opening(table: pd.DataFrame, gallery: Gallery) -> Opening:
    pictures = []
    models = in_order(table["model"])
    for model in models if gallery.has_room(len(models)) else []:
        figure = overview_figure(table, model)
        if figure is not None:
            name = _file_name(model, "overview")
            description = f"{model}: bits per byte lost on each text, by calibration data"
            pictures.append(gallery.add(figure, name, description))
    return Opening(advise(table), pictures, grid_notes(table))


def _section(
    table: pd.DataFrame, task: str, metric: str, reference: str | None, gallery: Gallery
) -> Section:
    rows = table[(table["task"] == task) & (table["metric"] == metric)]
    pruned = rows[rows["pruner"] != DENSE]
    label = reference if reference in set(rows["source"]) else None
    compared = pd.DataFrame() if label is None else compare_with_reference(rows, label)
    paired = set() if compared.empty else set(compared["model"])
    title = heading(task, metric, limit_of(table, task))
    models = in_order(pruned["model"])
    count = len(models) + len(paired)
    has_room = gallery.has_room(count)
    pictures = []
    for model in models if has_room else []:
        if label is not None and model in paired:
            figure = difference_figure(table, model, task, metric, label)
            name = _file_name(model, task, metric, "difference")
            description = f"{model}: {title}, differences from {label}"
            pictures.append(gallery.add(figure, name, description))
        figure = sparsity_figure(table, model, task, metric)
        name = _file_name(model, task, metric)
        description = f"{model}: {title}, against sparsity by calibration data"
        pictures.append(gallery.add(figure, name, description))
    return Section(
        title=title,
        anchor=_file_name(task, metric),
        name=f"{task}: {metric}",
        findings=[] if label is None else _findings(compared, label),
        best=None if label is None else best_table(table, task, metric, label),
        pictures=pictures,
        undrawn=0 if has_room else count,
        levels=level_table(table, task, metric, label),
    )


def _findings(compared: pd.DataFrame, reference: str) -> list[str]:
    """Say in how many settings each calibration beats the reference, and in how many surely."""
    sentences = []
    for source in in_order(compared["source"]):
        rows = compared[compared["source"] == source]
        ahead = rows["better"].astype(bool)
        sure = (rows["p_holm"] < SURE).to_numpy()
        better, worse = int((sure & ahead).sum()), int((sure & ~ahead).sum())
        median = effect_text(float(rows["effect"].median()), np.nan, np.nan, rows["unit"].iloc[0])
        verdict = (
            f"{better} surely better, {worse} surely worse" if better or worse else "none sure"
        )
        sentences.append(
            f"{source} is ahead of {reference} in {int(ahead.sum())} of {len(rows)} settings; the "
            f"median difference is {median}; after Holm's correction at {100 * SURE:.0f} %: "
            f"{verdict}."
        )
    return sentences


def _page(
    table: pd.DataFrame,
    opening: Opening,
    sections: list[Section],
    gallery: Gallery,
    reference: str | None,
    note: str | None,
    texts: Texts | None,
    fingerprint: str,
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages = cell_pages(table)
    places = {cell["id"]: place for place, cell in enumerate(pages["cells"])}
    cells = table.drop_duplicates(["grid", "cell"])
    retained, paper = retention_table(table), paper_layout(table)
    failed, missing = _lost_table(cells, "failed"), _lost_table(cells, "missing")
    tables = [each for section in sections for each in (section.best, section.levels)]
    tables += [retained, paper, failed, missing]
    long_tables = [each for each in tables if each is not None and len(each.rows) > ROWS]
    rows = [[[_field(entry, places) for entry in row] for row in each.rows] for each in long_tables]
    long_places = {id(each): place for place, each in enumerate(long_tables)}
    return environment.get_template("report.html").render(
        grid=", ".join(in_order(table["grid"])),
        counts=status_counts(table),
        reference=reference,
        note=note,
        opening=opening,
        texts=texts,
        fingerprint=fingerprint,
        sections=sections,
        retained=retained,
        paper=paper,
        failed=failed,
        missing=missing,
        versions=_versions(table),
        most_pictures=PICTURES,
        rows_shown=ROWS,
        long_place=lambda shown: long_places.get(id(shown)),
        places=places,
        is_null=pd.isna,
        data=_embedded({**pages, "tables": rows, "pictures": gallery.drawn}),
    )


def _field(entry: Entry, places: dict[str, int]) -> list[Any]:
    """Return a table's field for the page's script: text, number, whether best, cells."""
    number = None if entry.number is None or pd.isna(entry.number) else float(entry.number)
    return [entry.text, number, int(entry.is_best), [places[cell] for cell in entry.cells]]


def _embedded(document: dict[str, Any]) -> str:
    """Return JSON for a script element, compressed, as text."""
    content = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()


def _lost_table(cells: pd.DataFrame, status: str) -> TextTable | None:
    """Return the cells of a status with their errors; None if there are none."""
    lost = cells[cells["status"] == status]
    if lost.empty:
        return None
    reasons = lost["error"].fillna("no error was recorded" if status == "failed" else "")
    return cell_table(lost, [shorten(each, ERROR_LETTERS, placeholder=" ...") for each in reasons])


def status_counts(table: pd.DataFrame) -> dict[str, int]:
    """Return the numbers of cells that are ok, failed and missing."""
    cells = table.drop_duplicates(["grid", "cell"])["status"]
    return {status: int((cells == status).sum()) for status in ("ok", "failed", "missing")}


def _versions(table: pd.DataFrame) -> dict[str, str]:
    """Return each package's version; several if cells ran with different ones."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for text in table["versions"].dropna().unique():
        packages: dict[str, Any] = json.loads(text)
        for package, version in packages.items():
            found[package].add(str(version))
    return {package: ", ".join(sorted(found[package])) for package in sorted(found)}


def _file_name(*parts: str) -> str:
    return "_".join(re.sub(r"[^\w.-]+", "-", part) for part in parts)
