"""What pruning leaves of each capability, by hand."""

import math

import numpy as np
import pytest

from analysis.retention import retention, with_worst_retained, worst_retained
from analysis.tables import retention_table
from tests.analysis.conftest import DENSE, MakeTable, Row


def cell(numbers: dict[str, float], **fields: object) -> list[Row]:
    rows = []
    for name, value in numbers.items():
        task, _, metric = name.partition(": ")
        rows.append({**fields, "task": task, "metric": metric, "value": value})
    return rows


FULL = {"testbed_facts: acc": 0.85, "facts: bits_per_byte": 1.0, "code: bits_per_byte": 0.5}


def test_an_accuracy_counts_above_chance_and_a_text_by_its_bits(make_table: MakeTable) -> None:
    pruned = {"testbed_facts: acc": 0.55, "facts: bits_per_byte": 1.25, "code: bits_per_byte": 1.0}
    table = make_table([*cell(FULL, **DENSE), *cell(pruned)])
    found = retention(table).set_index("capability")
    assert found["retained"].to_dict() == pytest.approx(
        {"testbed_facts": 100 * 0.30 / 0.60, "facts": 80.0, "code": 50.0}
    )
    assert found["kind"].to_dict() == {"testbed_facts": "task", "facts": "text", "code": "text"}
    assert found.loc["code", ["dense", "level"]].to_list() == [0.5, 1.0]


def test_the_worst_is_named_with_the_mean_it_hides_behind(make_table: MakeTable) -> None:
    pruned = {"testbed_facts: acc": 0.85, "facts: bits_per_byte": 1.0, "code: bits_per_byte": 2.0}
    table = make_table([*cell(FULL, **DENSE), *cell(pruned)])
    (row,) = worst_retained(retention(table)).to_dict("records")
    assert (row["worst"], row["retained"], row["capabilities"]) == ("code", 25.0, 3)
    assert row["mean_retained"] == pytest.approx(75.0)


def test_the_worst_of_each_cell_becomes_a_metric(make_table: MakeTable) -> None:
    rows = cell(FULL, **DENSE)
    for seed, bits in enumerate(({"facts": 1.25, "code": 2.0}, {"facts": 4.0, "code": 0.5})):
        rows += cell({f"{name}: bits_per_byte": value for name, value in bits.items()}, seed=seed)
    table = make_table(rows)
    longer = with_worst_retained(table)
    added = longer[len(table) :]
    assert longer.dtypes.to_dict() == table.dtypes.to_dict()
    assert set(added["metric"]) == {"worst_retained"}
    assert added.groupby("cell")["value"].first().to_list() == pytest.approx([0.25, 0.25, 1.0])


def test_seeds_are_averaged(make_table: MakeTable) -> None:
    rows = cell({"facts: bits_per_byte": 1.0}, **DENSE)
    for seed, bits in enumerate((1.25, 2.0)):
        rows += cell({"facts: bits_per_byte": bits}, seed=seed)
    (row,) = retention(make_table(rows)).to_dict("records")
    assert (row["retained"], row["seeds"]) == (pytest.approx((80 + 50) / 2), 2)


def test_a_task_that_the_dense_model_cannot_do_has_no_share(make_table: MakeTable) -> None:
    guessed = {**DENSE, "stderr": 0.04}
    table = make_table(
        [
            *cell({"testbed_facts: acc": 0.30}, **guessed),
            *cell({"facts: bits_per_byte": 1.0}, **DENSE),
            *cell({"testbed_facts: acc": 0.20, "facts: bits_per_byte": 1.25}),
        ]
    )
    found = retention(table).set_index("capability")["retained"]
    assert np.isnan(found["testbed_facts"])
    assert worst_retained(retention(table))["worst"].to_list() == ["facts"]


def test_log_perplexity_stands_for_bits_per_byte_where_only_it_is_measured(
    make_table: MakeTable,
) -> None:
    table = make_table(
        [*cell({"wiki: perplexity": 8.0}, **DENSE), *cell({"wiki: perplexity": 16.0})]
    )
    (row,) = retention(table).to_dict("records")
    assert row["retained"] == pytest.approx(100 * math.log(8) / math.log(16))


def test_without_the_dense_model_nothing_is_known(make_table: MakeTable) -> None:
    assert retention(make_table(cell(FULL))).empty
    assert worst_retained(retention(make_table(cell(FULL)))).empty


def test_the_reports_table_puts_the_worst_before_all_capabilities(make_table: MakeTable) -> None:
    pruned = {"testbed_facts: acc": 0.85, "facts: bits_per_byte": 1.0, "code: bits_per_byte": 2.0}
    table = retention_table(make_table([*cell(FULL, **DENSE), *cell(pruned)]))
    assert table is not None
    (row,) = table.rows
    shown = dict(zip(table.headings, (entry.text for entry in row), strict=True))
    assert (shown["worst capability"], shown["retained (%)"], shown["mean (%)"]) == (
        "code",
        "25.0",
        "75.0",
    )
    assert (shown["calibration"], shown["facts"], shown["testbed_facts"]) == (
        "corpus",
        "100.0",
        "100.0",
    )
    assert retention_table(make_table(cell(FULL))) is None
