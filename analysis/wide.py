"""One row a cell, one column a metric."""

import pandas as pd

from analysis.labels import with_labels

NUMBER = (
    *("task", "metric", "value", "stderr", "samples"),
    *("limit", "num_fewshot", "task_version", "lm_eval", "dtype", "tokenizer", "chat_template"),
)
"""Columns that differ between the numbers of one cell."""


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """One row a cell with its own columns, then a column `TASK: METRIC` of each number.

    Cells that failed or have not run are rows too, with `status`, `error` and no numbers; so is
    a cell that lacks one of the metrics.

    Args:
        table: as `load_results` gives it.
    """
    labelled = with_labels(table)
    cells = labelled.drop_duplicates(["grid", "cell"])
    cells = cells.drop(columns=[name for name in NUMBER if name in cells]).reset_index(drop=True)
    rows = labelled[labelled["task"].notna()]
    named = rows["task"].str.cat(rows["metric"], sep=": ")
    order = named.unique()
    codes = cells.set_index(["grid", "cell"]).index
    numbers = rows.assign(number=pd.Categorical(named, order)).pivot_table(
        index=["grid", "cell"], columns="number", values="value", aggfunc="first", observed=True
    )
    numbers = numbers.reindex(index=codes, columns=order).reset_index(drop=True)
    numbers.columns.name = None
    return pd.concat([cells, numbers], axis=1)
