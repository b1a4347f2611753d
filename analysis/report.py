"""A grid's results as a folder: the table, its figures, and one page that holds all of it."""

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
)

LONG_COLUMNS = ["traceback", "note", "versions", "lineage", "prune_report"]
"""Left out of `table.csv`."""

SURE = 0.05
"""A corrected p below this is called sure."""


class Picture(NamedTuple):
    """A figure as the page shows it."""

    uri: str
    description: str


class Section(NamedTuple):
    """What the page tells of one metric of one task."""

    title: str
    anchor: str
    name: str
    findings: list[str]
    best: TextTable | None
    pictures: list[Picture]
    levels: TextTable


class Opening(NamedTuple):
    """What the page opens with."""

    advice: list[str]
    pictures: list[Picture]
    notes: list[str]
    """What the grid says that readers must know."""


def chosen_reference(table: pd.DataFrame, reference: str | None) -> str | None:
    """The label of the calibration that others are compared with: by default the first,
    None if no calibrated pruner has a result.

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

    Equal tables give equal bytes. A page that was made of this very table by this very code is left
    as it is.

    Args:
        table: one grid's results as `load_results` gives them.
        reference: a label in `source`; None if no calibrated pruner has a result.
        note: a remark for the top of the page.

    Returns:
        The page's path.
    """
    figures = output / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    page = output / "index.html"
    made_of = _fingerprint(table, reference, note)
    if page.is_file() and f'content="{made_of}"' in page.read_text(encoding="utf-8"):
        return page
    kept = table.drop(columns=[column for column in LONG_COLUMNS if column in table])
    kept.to_csv(output / "table.csv", index=False, lineterminator="\n")
    shown = with_mean_accuracy(table)
    metrics = dict.fromkeys([*headline_metrics(shown), *all_metrics(shown)])
    sections = [_section(shown, task, metric, reference, figures) for task, metric in metrics]
    told = _page(table, _answer(table, figures), sections, reference, note, made_of)
    page.write_text(told, encoding="utf-8")  # last, so that a page stands for the whole folder
    return page


def _fingerprint(table: pd.DataFrame, reference: str | None, note: str | None) -> str:
    """SHA-256 over all that a report is made of: the table, what it is asked, and the code."""
    digest = hashlib.sha256(table.to_json(orient="split", default_handler=str).encode())
    digest.update(json.dumps([reference, note, matplotlib.__version__]).encode())
    for source in sorted(Path(__file__).parent.glob("*")):
        if source.suffix in (".py", ".html", ".csv"):
            digest.update(source.read_bytes())
    return digest.hexdigest()


def _answer(table: pd.DataFrame, figures: Path) -> Opening:
    notes = grid_notes(table)
    pictures = []
    for model in in_order(table["model"]):
        figure = overview_figure(table, model, " ".join(notes))
        if figure is not None:
            name = _file_name(model, "overview")
            told = f"{model}: bits per byte lost on each text, by calibration data"
            pictures.append(_picture(figure, name, told, figures))
    return Opening([str(advice) for advice in advise(table)], pictures, notes)


def grid_notes(table: pd.DataFrame) -> list[str]:
    """What the grids of a table say that their readers must know."""
    return in_order(table["note"].dropna().astype(str)) if "note" in table else []


def _section(
    table: pd.DataFrame, task: str, metric: str, reference: str | None, figures: Path
) -> Section:
    rows = table[(table["task"] == task) & (table["metric"] == metric)]
    drawable = rows[(rows["pruner"] != DENSE) & np.isfinite(rows["value"])]
    label = reference if reference in set(rows["source"]) else None
    compared = pd.DataFrame() if label is None else compare_with_reference(rows, label)
    paired: set[str] = set()
    if not compared.empty:
        paired = set(compared.loc[np.isfinite(compared["effect"].astype(float)), "model"])
    pictures = []
    for model in in_order(drawable["model"]):
        told = f"{model}: {heading(task, metric, limit_of(table, task))}"
        if label is not None and model in paired:
            figure = difference_figure(table, model, task, metric, label)
            name = _file_name(model, task, metric, "difference")
            pictures.append(_picture(figure, name, f"{told}, differences from {label}", figures))
        figure = sparsity_figure(table, model, task, metric)
        name = _file_name(model, task, metric)
        pictures.append(
            _picture(figure, name, f"{told}, against sparsity by calibration data", figures)
        )
    return Section(
        title=heading(task, metric, limit_of(table, task)),
        anchor=_file_name(task, metric),
        name=f"{task}: {metric}",
        findings=[] if label is None else _findings(compared, label),
        best=None if label is None else best_table(table, task, metric, label),
        pictures=pictures,
        levels=level_table(table, task, metric, label),
    )


def _findings(compared: pd.DataFrame, reference: str) -> list[str]:
    """Of each calibration, in how many settings it beats the reference, and in how many surely."""
    told = []
    for source in in_order(compared["source"]):
        mine = compared[compared["source"] == source]
        ahead = mine["better"].astype(bool)
        sure = (mine["p_holm"] < SURE).to_numpy()
        better, worse = int((sure & ahead).sum()), int((sure & ~ahead).sum())
        median = effect_text(float(mine["effect"].median()), np.nan, np.nan, mine["unit"].iloc[0])
        holds = f"{better} surely better, {worse} surely worse" if better or worse else "none sure"
        told.append(
            f"{source} is ahead of {reference} in {int(ahead.sum())} of {len(mine)} settings, by "
            f"{median} at the median; after Holm's correction at {100 * SURE:.0f} %: {holds}."
        )
    return told


def _picture(figure: Figure, name: str, description: str, figures: Path) -> Picture:
    vector = svg_bytes(figure)
    (figures / f"{name}.svg").write_bytes(vector)
    (figures / f"{name}.png").write_bytes(png_bytes(figure))
    uri = "data:image/svg+xml;base64," + base64.b64encode(vector).decode()
    return Picture(uri, description)


def _page(
    table: pd.DataFrame,
    answer: Opening,
    sections: list[Section],
    reference: str | None,
    note: str | None,
    made_of: str,
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
        answer=answer,
        made_of=made_of,
        sections=sections,
        paper=paper_layout(table),
        lineage=_embedded(lineage_document(table)),
        failed=cells[cells["status"] == "failed"].to_dict("records"),
        missing=cells[cells["status"] == "missing"].to_dict("records"),
        versions=_versions(table),
        is_null=pd.isna,
    )


def _embedded(document: dict[str, Any]) -> str:
    """JSON that may stand in a script element: it cannot close it."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def status_counts(table: pd.DataFrame) -> dict[str, int]:
    """How many cells are ok, failed and missing."""
    cells = table.drop_duplicates(["grid", "cell"])["status"]
    return {status: int((cells == status).sum()) for status in ("ok", "failed", "missing")}


def _versions(table: pd.DataFrame) -> dict[str, str]:
    """Each package's version, all of them where cells ran with different ones."""
    if "versions" not in table:
        return {}
    found: defaultdict[str, set[str]] = defaultdict(set)
    for told in table["versions"].dropna().unique():
        packages: dict[str, Any] = json.loads(told)
        for package, version in packages.items():
            found[package].add(str(version))
    return {package: ", ".join(sorted(found[package])) for package in sorted(found)}


def _file_name(*parts: str) -> str:
    return "_".join(re.sub(r"[^\w.-]+", "-", part) for part in parts)
