"""A grid's results as a folder: the table, its figures, and one self-contained page."""

import base64
import hashlib
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.advice import advise
from analysis.figures import difference_figure, png_bytes, sparsity_figure, svg_bytes
from analysis.labels import DENSE, NO_CALIBRATION, in_order
from analysis.lineage import lineage_document
from analysis.metrics import effect_text, heading
from analysis.overview import overview_figure
from analysis.statistics import (
    compare_with_reference,
    measured,
    reference_label,
    with_mean_accuracy,
)
from analysis.tables import (
    TextTable,
    all_metrics,
    best_table,
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


class Picture(NamedTuple):
    """A figure on the page."""

    uri: str
    description: str


class Section(NamedTuple):
    """The page's section on one metric of one task."""

    title: str
    anchor: str
    name: str
    findings: list[str]
    best: TextTable | None
    pictures: list[Picture]
    levels: TextTable


class Opening(NamedTuple):
    """The first section of the page."""

    advice: list[str]
    pictures: list[Picture]
    notes: list[str]
    """The grid's notes to readers."""


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
    table: pd.DataFrame, output: Path, reference: str | None, note: str | None = None
) -> Path:
    """Write `table.csv`, `figures/` in PNG and SVG, and `index.html`, which needs no other file.

    Equal tables give equal bytes. A page that the same code made from the same table is left as it
    is.

    Args:
        table: one grid's results as `load_results` returns them.
        output: folder to write.
        reference: a label in `source`; None if no calibrated pruner has a result.
        note: a remark for the top of the page.

    Returns:
        The page's path.
    """
    figures = output / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    page = output / "index.html"
    fingerprint = _fingerprint(table, reference, note)
    if page.is_file() and f'content="{fingerprint}"' in page.read_text(encoding="utf-8"):
        return page
    short = table.drop(columns=LONG_COLUMNS)
    short.to_csv(output / "table.csv", index=False, lineterminator="\n")
    shown = with_mean_accuracy(table)
    metrics = dict.fromkeys([*headline_metrics(shown), *all_metrics(shown)])
    sections = [_section(shown, task, metric, reference, figures) for task, metric in metrics]
    html = _page(table, _opening(table, figures), sections, reference, note, fingerprint)
    page.write_text(html, encoding="utf-8")  # last: a page means that the folder is complete
    return page


def _fingerprint(table: pd.DataFrame, reference: str | None, note: str | None) -> str:
    """Return the SHA-256 of the table, the arguments and the code that a report is made from."""
    digest = hashlib.sha256(table.to_json(orient="split", default_handler=str).encode())
    digest.update(json.dumps([reference, note, matplotlib.__version__]).encode())
    for source in sorted(Path(__file__).parent.glob("*")):
        if source.suffix in (".py", ".html", ".csv"):
            digest.update(source.read_bytes())
    return digest.hexdigest()


def _opening(table: pd.DataFrame, figures: Path) -> Opening:
    notes = grid_notes(table)
    pictures = []
    for model in in_order(table["model"]):
        figure = overview_figure(table, model, " ".join(notes))
        if figure is not None:
            name = _file_name(model, "overview")
            description = f"{model}: bits per byte lost on each text, by calibration data"
            pictures.append(_picture(figure, name, description, figures))
    return Opening([str(advice) for advice in advise(table)], pictures, notes)


def grid_notes(table: pd.DataFrame) -> list[str]:
    """Return the notes to readers of a table's grids."""
    return in_order(table["note"].dropna().astype(str))


def _section(
    table: pd.DataFrame, task: str, metric: str, reference: str | None, figures: Path
) -> Section:
    rows = table[(table["task"] == task) & (table["metric"] == metric)]
    pruned = rows[rows["pruner"] != DENSE]
    label = reference if reference in set(rows["source"]) else None
    compared = pd.DataFrame() if label is None else compare_with_reference(rows, label)
    paired = set() if compared.empty else set(compared["model"])
    title = heading(task, metric, limit_of(table, task))
    pictures = []
    for model in in_order(pruned["model"]):
        if label is not None and model in paired:
            figure = difference_figure(table, model, task, metric, label)
            name = _file_name(model, task, metric, "difference")
            description = f"{model}: {title}, differences from {label}"
            pictures.append(_picture(figure, name, description, figures))
        figure = sparsity_figure(table, model, task, metric)
        name = _file_name(model, task, metric)
        description = f"{model}: {title}, against sparsity by calibration data"
        pictures.append(_picture(figure, name, description, figures))
    return Section(
        title=title,
        anchor=_file_name(task, metric),
        name=f"{task}: {metric}",
        findings=[] if label is None else _findings(compared, label),
        best=None if label is None else best_table(table, task, metric, label),
        pictures=pictures,
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


def _picture(figure: Figure, name: str, description: str, figures: Path) -> Picture:
    vector = svg_bytes(figure)
    (figures / f"{name}.svg").write_bytes(vector)
    (figures / f"{name}.png").write_bytes(png_bytes(figure))
    uri = "data:image/svg+xml;base64," + base64.b64encode(vector).decode()
    return Picture(uri, description)


def _page(
    table: pd.DataFrame,
    opening: Opening,
    sections: list[Section],
    reference: str | None,
    note: str | None,
    fingerprint: str,
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    cells = table.drop_duplicates(["grid", "cell"])
    return environment.get_template("report.html").render(
        grid=", ".join(in_order(table["grid"])),
        counts=status_counts(table),
        reference=reference,
        note=note,
        opening=opening,
        fingerprint=fingerprint,
        sections=sections,
        retained=retention_table(table),
        paper=paper_layout(table),
        lineage=_embedded(lineage_document(table)),
        failed=cells[cells["status"] == "failed"].to_dict("records"),
        missing=cells[cells["status"] == "missing"].to_dict("records"),
        versions=_versions(table),
        is_null=pd.isna,
    )


def _embedded(document: dict[str, Any]) -> str:
    """Return JSON for a script element, which it must not be able to close."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


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
