import json

from tests.analysis.conftest import MakeTable, Row


def methods(make_table: MakeTable, rows: list[Row]) -> list[str]:
    table = make_table([{"cell": str(number), **row} for number, row in enumerate(rows)])
    return table["method"].tolist()


def allocated(name: str, **fields: object) -> Row:
    options = json.dumps(fields.pop("options", {}))
    return {"allocation": name, "allocation_options": options, "nsamples": 128, **fields}


def test_one_allocation_for_all_is_not_named(make_table: MakeTable) -> None:
    assert (
        methods(make_table, [allocated("owl", seed=0), allocated("owl", seed=1)]) == ["wanda"] * 2
    )


def test_allocations_differ_by_name_and_those_of_one_name_by_their_options(
    make_table: MakeTable,
) -> None:
    rows = [
        allocated("uniform"),
        allocated("arithmetic-progression", options={"difference": 0.01}),
        allocated("owl"),
        allocated("owl", options={"spread": 0.1}),
    ]
    assert methods(make_table, rows) == [
        "wanda, uniform",
        "wanda, arithmetic-progression",
        "wanda, owl, default options",
        "wanda, owl, spread 0.1",
    ]


def test_reconstruction_is_part_of_the_method_and_its_options_where_it_has_some(
    make_table: MakeTable,
) -> None:
    rows: list[Row] = [{}, {"reconstruction": "{}"}, {"reconstruction": '{"epochs": 2}'}]
    assert methods(make_table, rows) == [
        "wanda",
        "wanda, reconstructed",
        "wanda, reconstructed (epochs 2)",
    ]


def test_bits_are_the_targets_and_no_method(make_table: MakeTable) -> None:
    def rounded(**options: int) -> Row:
        bits = options.get("bits", 4)
        given = {"pruner_options": json.dumps(options), "bits": bits, "sparsity": 0.0}
        return {"pruner": "gptq", **given}

    assert methods(make_table, [rounded(), rounded(bits=3)]) == ["gptq", "gptq"]
    several = [rounded(), rounded(bits=3), rounded(bits=3, group_size=64)]
    expected = ["gptq, default options", "gptq, default options", "gptq, group_size 64"]
    assert methods(make_table, several) == expected


def test_magnitude_with_and_without_data_differs_by_the_allocation_alone(
    make_table: MakeTable,
) -> None:
    rows = [
        allocated("uniform", pruner="magnitude", calibration="none", nsamples=None, seed=None),
        allocated("owl", pruner="magnitude"),
    ]
    assert methods(make_table, rows) == ["magnitude, uniform", "magnitude, owl"]


def test_the_amount_of_data_is_named_where_it_varies_within_an_allocation(
    make_table: MakeTable,
) -> None:
    rows = [allocated("owl"), allocated("owl", nsamples=16), allocated("uniform")]
    assert methods(make_table, rows) == [
        "wanda, owl, 128 windows",
        "wanda, owl, 16 windows",
        "wanda, uniform",
    ]
