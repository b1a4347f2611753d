"""The design that a grid declares: `results/<grid>.design.json`, which `run` writes first."""

from pathlib import Path
from typing import Any, NamedTuple

from analysis.load import read_document


class RecordedContrast(NamedTuple):
    """One side of a comparison against the other."""

    name: str
    metric: str
    tasks: tuple[str, ...]
    """Empty: all that have the metric."""
    smallest: float
    """Smallest effect of interest, in the metric's unit."""
    family: str
    """Contrasts of one family have simultaneous intervals."""
    pairs: tuple[tuple[str, str, int], ...]
    """Cells of the first side and the second, and the number of the setting that they share."""


class RecordedChoice(NamedTuple):
    """A comparison of several candidates with the best of them."""

    name: str
    metric: str
    tasks: tuple[str, ...]
    candidates: tuple[str, ...]
    blocks: tuple[tuple[int, tuple[str, ...]], ...]
    """The number of a setting, and one cell for each candidate."""


class RecordedFloor(NamedTuple):
    """Levels beyond which a model is of no use."""

    times_dense: float | None = None
    """This many times the dense model's value, for metrics of which lower is better."""
    levels: dict[str, float] = {}  # noqa: RUF012 - never changed
    """By task."""


class RecordedDesign(NamedTuple):
    """What was declared of a grid, and when."""

    contrasts: dict[str, RecordedContrast]
    choices: dict[str, RecordedChoice]
    floor: RecordedFloor
    history: str
    """Whether it was declared before the results, as a sentence."""


def read_design(location: str | Path, grid: str) -> RecordedDesign | None:
    """Return the declared design of a grid; None if the store has none.

    Args:
        location: a store's folder or fsspec URL, or one Parquet file in it.
        grid: the grid's name.
    """
    document = read_document(location, f"{grid}.design.json")
    return None if document is None else parse_design(document)


def parse_design(document: dict[str, Any]) -> RecordedDesign:
    """Return the design that a document of `results/` holds."""
    declared = document["history"][-1]["design"]
    floor = declared["floor"] or {}
    return RecordedDesign(
        contrasts={
            fields["name"]: RecordedContrast(
                name=fields["name"],
                metric=fields["metric"],
                tasks=tuple(fields["tasks"]),
                smallest=fields["smallest"],
                family=fields["family"],
                pairs=tuple(
                    (first, second, at) for first, second, at in document["pairs"][fields["name"]]
                ),
            )
            for fields in declared["contrasts"]
        },
        choices={
            fields["name"]: RecordedChoice(
                name=fields["name"],
                metric=fields["metric"],
                tasks=tuple(fields["tasks"]),
                candidates=tuple(document["candidates"][fields["name"]]),
                blocks=tuple(
                    (at, tuple(cells)) for at, cells in document["blocks"][fields["name"]]
                ),
            )
            for fields in declared["choices"]
        },
        floor=RecordedFloor(floor.get("times_dense"), floor.get("levels", {})),
        history=_history(document["history"]),
    )


def _history(versions: list[dict[str, Any]]) -> str:
    """Say when the design was declared, and how often it was changed after results existed."""
    first, *later = versions
    if first["measured"] == 0:
        text = "The design was declared before there was a result."
    else:
        text = (
            f"The design was declared when {first['measured']} of {first['cells']} cells had "
            "results."
        )
    late = [version for version in later if version["measured"] > 0]
    if late:
        last = late[-1]
        text += (
            f" It was changed after results existed: {len(late)} time{'s'[: len(late) > 1]}, last "
            f"when {last['measured']} of {last['cells']} cells had results."
        )
    return text
