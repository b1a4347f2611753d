import pandas as pd
import pytest

from analysis.paper import OURS, paper_table, published
from tests.analysis.conftest import DENSE, MakeTable
from tests.analysis.test_statistics import seeds


@pytest.fixture
def llama(make_table: MakeTable) -> pd.DataFrame:
    number = {"model": "llama-2-7b", "task": "wikitext2", "metric": "perplexity"}
    at = {**number, "sparsity": 0.5}
    failed = {"status": "failed", "task": None, "metric": None, "seed": 2}
    return make_table(
        [
            {**DENSE, **number, "value": 5.2},
            *seeds("c4", [6.4, 6.6], **at),
            {**at, **failed, "calibration": "c4"},
            *[
                row
                for task in ("boolq", "zebra", "arc_easy")
                for row in seeds("c4", [0.6, 0.8], **{**at, "task": task, "metric": "acc"})
            ],
        ]
    )


def test_published_rows_stand_by_ours_of_the_same_model_and_are_marked(llama: pd.DataFrame) -> None:
    laid_out = paper_table(llama)
    same_model = laid_out[laid_out["model"] == "llama-2-7b"]
    wanda = same_model[(same_model["method"] == "wanda") & (same_model["target"] == "50 %")]
    assert wanda["origin"].to_list()[0] == OURS
    assert wanda["wikitext2: perplexity"].to_list() == pytest.approx([6.5, 6.42])
    assert "2306.11695" in wanda["origin"].to_list()[1]
    first_other = laid_out.index[laid_out["model"] != "llama-2-7b"].min()
    assert same_model.index.max() < first_other
    assert set(laid_out["target"]) <= {"dense", "50 %", "not stated"}


def test_columns_are_perplexity_then_the_papers_tasks_then_others_then_means(
    llama: pd.DataFrame,
) -> None:
    numbers = [name for name in paper_table(llama) if ": " in name and not name.endswith(" sd")]
    assert numbers == [
        "wikitext2: perplexity",
        "boolq: acc",
        "arc_easy: acc",
        "zebra: acc",
        "mean of 3 tasks: acc",
        "the paper's tasks: acc",
    ]


def test_means_seeds_and_lost_cells_are_shown(llama: pd.DataFrame) -> None:
    ours = paper_table(llama, models=[])
    assert set(ours["origin"]) == {OURS}
    row = ours[ours["method"] == "wanda"].iloc[0]
    assert (row["seeds"], row["lost"]) == (2, 1)
    assert row["wikitext2: perplexity sd"] == pytest.approx(0.1 * 2**0.5)
    assert row["mean of 3 tasks: acc"] == pytest.approx(0.7)


def test_every_published_number_has_a_place_and_a_plausible_value() -> None:
    rows = published()
    assert rows[["source", "place", "model", "task", "metric", "value"]].notna().all(axis=None)
    shares = rows.loc[rows["metric"] == "acc", "value"]
    assert shares.between(0, 1).all()
    assert (rows.loc[rows["metric"] == "perplexity", "value"] > 1).all()
    keys = ["place", "model", "pruner", "allocation", "calibration", "target", "nsamples", "task"]
    assert not rows.duplicated(keys).any()


def test_in_published_tables_pruning_harms_and_the_source_counts_more_than_the_amount() -> None:
    rows = published()
    dense = rows[rows["pruner"] == "dense"].set_index(["place", "model"])["value"]
    for row in rows[(rows["metric"] == "perplexity") & (rows["pruner"] != "dense")].itertuples():
        if (row.place, row.model) in dense.index:
            assert row.value > dense[(row.place, row.model)]
    means = rows[rows["metric"] == "acc"].groupby("calibration")["value"].agg(["mean", "std"])
    assert means.loc["dclm", "mean"] - means.loc["wikipedia", "mean"] == pytest.approx(
        0.019, abs=1e-3
    )
    assert means["std"].max() < 0.002
