"""One row per cell, one column per metric."""

import pandas as pd

NUMBER = (
    *("task", "metric", "value", "stderr", "samples"),
    *("limit", "num_fewshot", "task_version", "lm_eval", "dtype", "tokenizer", "chat_template"),
)
"""Columns that differ between the numbers of one cell."""


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row per cell: its own columns, then one column `TASK: METRIC` per number.

    A cell that failed or has not run is a row without numbers.

    Args:
        table: as `load_results` returns it.
    """
    cells = table.drop_duplicates(["grid", "cell"])
    cells = cells.drop(columns=list(NUMBER)).reset_index(drop=True)
    rows = table[table["task"].notna()]
    named = rows["task"].str.cat(rows["metric"], sep=": ")
    order = named.unique()
    codes = cells.set_index(["grid", "cell"]).index
    numbers = rows.assign(number=pd.Categorical(named, order)).pivot_table(
        index=["grid", "cell"], columns="number", values="value", aggfunc="first", observed=True
    )
    numbers = numbers.reindex(index=codes, columns=order).reset_index(drop=True)
    numbers.columns.name = None
    return pd.concat([cells, numbers], axis=1)
