import pandas as pd

import analysis


def test_each_cell_is_one_row_with_one_column_per_metric(table: pd.DataFrame) -> None:
    cells = analysis.wide(table)
    assert cells["cell"].to_list() == table["cell"].unique().tolist()
    assert cells.columns[-3:].to_list() == ["heldout: perplexity", "colours: acc", "rivers: acc"]
    for row in table[table["value"].notna()].itertuples():
        value = cells.loc[cells["cell"] == row.cell, f"{row.task}: {row.metric}"]
        assert value.to_list() == [row.value]


def test_lost_cells_keep_their_rows_without_numbers(table: pd.DataFrame) -> None:
    cells = analysis.wide(table)
    lost = cells[cells["status"] != "ok"]
    assert sorted(lost["status"]) == ["failed", "missing"]
    assert lost[["heldout: perplexity", "colours: acc", "rivers: acc"]].isna().all(axis=None)
    assert lost["error"].notna().sum() == 1


def test_a_grid_of_failed_cells_has_rows_too(table: pd.DataFrame) -> None:
    failed = table[table["status"] == "failed"]
    assert analysis.wide(failed)["status"].to_list() == ["failed"]
