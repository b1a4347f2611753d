"""A pruned model beside its dense one: what was measured of both."""

import io
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.table import Table

from cluster.store import Store

USELESS = 2.0
"""A perplexity of so many times the dense model's is called of little use."""

_NAMES = {
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "kl": "KL from dense, nats a token",
    "top_token_changes": "another likeliest token",
}
"""Metrics of texts in words, in the order of a table; others keep their names and follow."""

_SHARES = ("top_token_changes", "flips")


class BeforeAfter(NamedTuple):
    """One number, of the dense and of the pruned model."""

    task: str
    metric: str
    dense: float | None
    """None for a distance from the dense model."""
    pruned: float
    stderr: float | None
    """Standard error of the pruned model's number, over windows or questions."""
    samples: int | None
    """Windows or questions."""

    @property
    def ratio(self) -> float | None:
        """The pruned model's number in times the dense one's."""
        return self.pruned / self.dense if self.dense else None


def before_after(table: pa.Table, key: str) -> list[BeforeAfter]:
    """Return what a results table says of the pruned model `key` and of its dense one."""
    own = _measured(table, pc.equal(table["prune_key"], key))
    if not own:
        return []
    is_dense = pc.and_(
        pc.equal(table["pruner"], "dense"), pc.equal(table["model"], own[0]["model"])
    )
    dense = {(row["task"], row["metric"]): row["value"] for row in _measured(table, is_dense)}
    order = list(_NAMES)
    own.sort(key=lambda row: order.index(row["metric"]) if row["metric"] in order else len(order))
    own.sort(key=lambda row: str(row["task"]))
    return [
        BeforeAfter(
            row["task"],
            row["metric"],
            dense.get((row["task"], row["metric"])),
            row["value"],
            row["stderr"],
            row["samples"],
        )
        for row in own
    ]


def measured_in(store: Store, key: str) -> list[BeforeAfter]:
    """Return what the store's results tables say of the pruned model `key`, each number once."""
    found: dict[tuple[str, str], BeforeAfter] = {}
    for name in sorted(store.names("results", ".parquet")):
        content = store.read(f"results/{name}.parquet")
        if content is None:
            continue
        for each in before_after(pq.read_table(io.BytesIO(content)), key):
            found.setdefault((each.task, each.metric), each)
    return list(found.values())


def _measured(table: pa.Table, chosen: Any) -> list[dict[str, Any]]:
    columns = ["model", "task", "metric", "value", "stderr", "samples"]
    rows: list[dict[str, Any]] = table.filter(chosen).select(columns).to_pylist()
    return [row for row in rows if row["metric"] is not None]


def as_table(measured: Iterable[BeforeAfter], title: str) -> Table:
    """Return a table with a row for each number."""
    table = Table(title=title, title_justify="left")
    for heading in ("measured on", "metric"):
        table.add_column(heading)
    for heading in ("dense", "pruned", "times"):
        table.add_column(heading, justify="right")
    for each in measured:
        table.add_row(*cells_of(each))
    return table


def cells_of(each: BeforeAfter) -> list[str]:
    """Return a number's cells: measured on, metric, dense, pruned with its error, times."""
    form = "{:.1%}" if each.metric in _SHARES else "{:.4g}"
    error = "" if each.stderr is None else f" ± {_short(form).format(each.stderr)}"
    dense = "" if each.dense is None else form.format(each.dense)
    ratio = "" if each.ratio is None else f"{each.ratio:.2f}"
    metric = _NAMES.get(each.metric, each.metric)
    return [each.task, metric, dense, form.format(each.pruned) + error, ratio]


def _short(form: str) -> str:
    return form.replace(".4g", ".2g")


def losses(measured: Sequence[BeforeAfter]) -> list[str]:
    """Return a sentence for each text on what the pruned model lost, the worst first."""
    by_task: dict[str, dict[str, BeforeAfter]] = {}
    for each in measured:
        by_task.setdefault(each.task, {})[each.metric] = each
    found = []
    for task, metrics in by_task.items():
        perplexity, kl = metrics.get("perplexity"), metrics.get("kl")
        if perplexity is None or perplexity.ratio is None:
            continue
        ratio = perplexity.ratio
        sentence = (
            f"{task}: perplexity {perplexity.dense:.4g} → {perplexity.pruned:.4g}, "
            f"{ratio:.2f} times"
        )
        if kl is not None:
            sentence += f"; {kl.pruned:.3g} nats a token from the dense model"
        if ratio > USELESS:
            sentence += f". More than {USELESS:g} times: of little use on such text"
        found.append((ratio, sentence))
    return [sentence for _, sentence in sorted(found, reverse=True)]
