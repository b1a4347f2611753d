"""What pruning leaves of each capability, and which capability it leaves least of.

A mean over tasks hides a capability that is lost. Retained is the share of the dense model's: of
an accuracy the part above chance, of a text's compression dense over pruned bits per byte.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from analysis.labels import DENSE
from analysis.statistics import measured

CHANCE: Mapping[str, float] = {
    **dict.fromkeys(("boolq", "piqa", "winogrande", "rte", "copa", "wic", "wsc"), 1 / 2),
    **dict.fromkeys(("hellaswag", "arc_easy", "arc_challenge", "openbookqa", "mmlu"), 1 / 4),
    **{
        f"real_lastword_{kind}": 1 / 4
        for kind in ("wikipedia", "shakespeare", "python", "fortunes")
    },
    **{
        f"real_lastword_handbook-{language}": 1 / 4
        for language in ("english", "french", "german", "spanish")
    },
    **dict.fromkeys(("testbed_facts", "testbed_arithmetic", "testbed_foreign"), 1 / 4),
}
"""Accuracy of guessing, by task."""

SETTING = ["grid", "model", "method", "target", "source"]

ERRORS = 2
"""A dense accuracy fewer standard errors than this above chance is no capability."""


def retention(table: pd.DataFrame, chance: Mapping[str, float] = CHANCE) -> pd.DataFrame:
    """Return what each setting retains of each capability, in percent of the dense model's.

    One row per setting and capability: `capability` (a task or text), `kind` (`task` or `text`),
    `dense` and `level` (accuracy or bits per byte; log perplexity where these are not measured),
    `retained`, and `seeds` averaged. `retained` is NaN where the dense model is not above chance.
    A task whose chance is not known counts from 0. Settings of models without a dense evaluation
    have no row.

    Args:
        table: as `load_results` returns it.
        chance: accuracy of guessing, by task.
    """
    rows = _shares(table, chance)
    pruned = rows[rows["pruner"] != DENSE]
    groups = pruned.groupby([*SETTING, "kind", "task"], observed=True, sort=True)
    found = groups.agg(
        dense=("dense", "first"),
        level=("score", "mean"),
        retained=("retained", "mean"),
        seeds=("score", "size"),
    )
    return found.reset_index().rename(columns={"task": "capability"})


def worst_retained(retained: pd.DataFrame) -> pd.DataFrame:
    """Return one row per setting: the capability it retains least of.

    Columns after those of the setting: `worst`, `retained` (of it), `mean_retained` and
    `capabilities`, the number of them with a known share.
    """
    known = retained.dropna(subset="retained")
    groups = known.groupby(SETTING, observed=True, sort=True)["retained"]
    means = groups.agg(mean_retained="mean", capabilities="size").reset_index()
    least = known.loc[groups.idxmin(), [*SETTING, "capability", "retained"]]
    return least.rename(columns={"capability": "worst"}).merge(means, on=SETTING)


def with_worst_retained(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with one more row per cell: the metric `worst_retained`, its lowest share
    over capabilities, between 0 and 1.

    Args:
        table: as `load_results` returns it.
    """
    known = _shares(table, CHANCE).dropna(subset="retained")
    worst = known.loc[known.groupby("cell")["retained"].idxmin()]
    share = worst["retained"] / 100
    rows = worst.assign(
        task="worst capability", metric="worst_retained", value=share, stderr=np.nan
    )
    return pd.concat([table, rows[table.columns]], ignore_index=True)


def _shares(table: pd.DataFrame, chance: Mapping[str, float]) -> pd.DataFrame:
    """Return each cell's capabilities with `dense`, the dense model's, and `retained`, in percent
    of it."""
    rows = _capabilities(measured(table))
    same = ["grid", "model", "task", "kind"]
    dense = rows.loc[rows["pruner"] == DENSE, [*same, "score", "stderr"]]
    dense = dense.rename(columns={"score": "dense", "stderr": "dense_error"})
    rows = rows.merge(dense, on=same)
    guessing = rows["task"].map(chance).fillna(0.0).astype(float)
    above = rows["dense"] - guessing
    known = above > ERRORS * rows["dense_error"].fillna(0.0)
    of_task = ((rows["score"] - guessing) / above).where(known)
    retained = of_task.where(rows["kind"] == "task", rows["dense"] / rows["score"])
    return rows.assign(retained=100 * retained)


def _capabilities(rows: pd.DataFrame) -> pd.DataFrame:
    """Return accuracies and bits per byte as `score`, with their `kind`."""
    accuracies = rows[rows["metric"] == "acc"].assign(kind="task")
    texts = rows[rows["metric"] == "bits_per_byte"].assign(kind="text")
    others = rows[(rows["metric"] == "perplexity") & ~rows["task"].isin(set(texts["task"]))]
    values = np.log(others["value"].to_numpy(dtype=np.float64))
    found = [accuracies, texts, others.assign(kind="text", value=values)]
    return pd.concat(found, ignore_index=True).rename(columns={"value": "score"})
