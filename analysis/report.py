"""A grid's results as a folder: the table, its figures, and one page that holds all of it."""

import base64
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pandas as pd

from analysis.figures import png_bytes, sparsity_figure, svg_bytes
from analysis.labels import DENSE, NO_CALIBRATION, in_order
from analysis.metrics import heading
from analysis.statistics import measured, reference_label, with_mean_accuracy
from analysis.tables import (
    TextTable,
    all_metrics,
    best_table,
    headline_metrics,
    level_table,
    limit_of,
)

LONG_COLUMNS = ["traceback", "versions", "lineage", "prune_report"]
"""Left out of `table.csv`."""


class Picture(NamedTuple):
    """A figure as the page shows it."""

    uri: str
    description: str


class Section(NamedTuple):
    """What the page tells of one metric of one task."""

    title: str
    anchor: str
    best: TextTable | None
    pictures: list[Picture]
    levels: TextTable


def chosen_reference(table: pd.DataFrame, reference: str | None) -> str | None:
    """The label of the calibration that others are compared with: by default the first by name,
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

    Equal tables give equal bytes.

    Args:
        table: one grid's results as `load` gives them.
        reference: a label in `source`; None if no calibrated pruner has a result.
        note: a remark for the top of the page.

    Returns:
        The page's path.
    """
    figures = output / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    kept = table.drop(columns=[column for column in LONG_COLUMNS if column in table])
    kept.to_csv(output / "table.csv", index=False, lineterminator="\n")
    shown = with_mean_accuracy(table)
    metrics = dict.fromkeys([*headline_metrics(shown), *all_metrics(shown)])
    sections = [_section(shown, task, metric, reference, figures) for task, metric in metrics]
    page = output / "index.html"
    page.write_text(_page(table, sections, reference, note), encoding="utf-8")
    return page


def _section(
    table: pd.DataFrame, task: str, metric: str, reference: str | None, figures: Path
) -> Section:
    rows = table[(table["task"] == task) & (table["metric"] == metric)]
    drawable = (rows["pruner"] != DENSE) & np.isfinite(rows["value"])
    compared = reference is not None and reference in set(rows["source"])
    return Section(
        title=heading(task, metric, limit_of(table, task)),
        anchor=_file_name(task, metric),
        best=best_table(table, task, metric, reference) if compared and reference else None,
        pictures=[
            _picture(table, model, task, metric, figures)
            for model in in_order(rows.loc[drawable, "model"])
        ],
        levels=level_table(table, task, metric, reference if compared else None),
    )


def _picture(table: pd.DataFrame, model: str, task: str, metric: str, figures: Path) -> Picture:
    figure = sparsity_figure(table, model, task, metric)
    name = _file_name(model, task, metric)
    vector = svg_bytes(figure)
    (figures / f"{name}.svg").write_bytes(vector)
    (figures / f"{name}.png").write_bytes(png_bytes(figure))
    uri = "data:image/svg+xml;base64," + base64.b64encode(vector).decode()
    what = heading(task, metric, limit_of(table, task))
    return Picture(uri, f"{model}: {what}, against sparsity by calibration data")


def _page(
    table: pd.DataFrame, sections: list[Section], reference: str | None, note: str | None
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
        sections=sections,
        failed=cells[cells["status"] == "failed"].to_dict("records"),
        missing=cells[cells["status"] == "missing"].to_dict("records"),
        versions=_versions(table),
        is_null=pd.isna,
    )


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
