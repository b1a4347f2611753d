import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.floor import floating_point_operations
from benchmarks.geometry import LLAMA_2_7B, TESTBED, Geometry
from benchmarks.measure import PRUNER_NAMES, GrowthRow, MaskRow, PrunerRow
from benchmarks.prune import measure_pruning, print_tables
from benchmarks.record import write_json
from benchmarks.targets import targets
from pipeline.specs import PretrainSpec

TINY = Geometry("tiny", 32, 64, 1, 2, 1, 64, nsamples=2, seqlen=8)
CPU = torch.device("cpu")


@pytest.mark.parametrize("plainly", [True, False])
def test_a_whole_run_on_a_tiny_geometry_prints_its_tables_and_writes_them(
    plainly: bool, tmp_path: Path
) -> None:
    dtype = torch.float32 if plainly else torch.bfloat16  # as on a CPU, and as on a GPU
    report = measure_pruning([TINY], TINY, CPU, dtype, plainly, 16, 0.0)
    text = StringIO()
    print_tables(report, Console(file=text, width=160))
    for title in ("Pruning", "2:4 masks", "Growth", "Targets"):
        assert title in text.getvalue()
    output = tmp_path / "new" / "report.json"
    write_json(output, report)
    written = json.loads(output.read_text())
    assert [row["pruner"] for row in written["pruners"]] == PRUNER_NAMES
    for row in written["pruners"]:
        assert row["seconds"] > 0
        assert (row["ratio"] is not None) == plainly
        assert row["peak_bytes"] is None
        if plainly:
            assert row["ratio"] == row["plain_seconds"] / row["seconds"]
            assert row["agreement"]["weights"] == 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64
    assert [row["sizes"] for row in written["growth"]] == [[1, 2, 4], [2, 4, 8]] * len(PRUNER_NAMES)


def test_the_testbed_geometry_has_the_shape_of_the_testbeds_model() -> None:
    spec = PretrainSpec(mixture={"facts": 1.0})
    assert (TESTBED.hidden, TESTBED.intermediate) == (spec.hidden_size, spec.intermediate_size)
    assert (TESTBED.layers, TESTBED.vocabulary) == (spec.num_layers, spec.vocab_size)
    assert TESTBED.hidden // TESTBED.heads == spec.head_dim
    assert (TESTBED.key_value_heads, TESTBED.seqlen) == (spec.num_key_value_heads, spec.seqlen)


@pytest.mark.parametrize("geometry", [TESTBED, TINY])
def test_a_geometry_lists_the_matrices_of_its_model(geometry: Geometry) -> None:
    layer = geometry.model(CPU, torch.float32).model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    expected = [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]
    shapes = [[tuple(linear.weight.shape) for linear in group] for group in expected]
    assert geometry.matrices == shapes


def test_a_geometrys_model_and_windows_are_the_same_every_time() -> None:
    one, other = (TINY.model(CPU, torch.bfloat16) for _ in range(2))
    assert one.dtype == torch.bfloat16
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        assert left.equal(right)
    assert TINY.windows().equal(TINY.windows())


def test_the_floor_of_llama_2_7b_is_just_under_two_forward_passes() -> None:
    """A forward pass over 128 x 2048 tokens takes attention, and 2 FLOP for each of 6.48e9 weights
    and each token."""
    forward = 128 * 2048 * (2 * 6.476e9 + 32 * 2 * 2048 * 4096)
    assert 1.7 * forward < floating_point_operations(LLAMA_2_7B, "wanda") < 2 * forward
    assert floating_point_operations(LLAMA_2_7B, "magnitude") == 0


def test_sparsegpts_floor_adds_half_products_inverses_and_updates() -> None:
    added = floating_point_operations(TINY, "sparsegpt") - floating_point_operations(TINY, "wanda")
    hessians = 16 * (3 * 32**2 + 64**2)
    inverses = 3 * (2 * 32**3 // 3) + 2 * 64**3 // 3
    updates = (2 * 32 + 2 * 16 + 2 * 64) * 32**2 + 32 * 64**2
    assert added == hessians + inverses + updates


def test_growth_along_a_straight_line_has_its_slope_and_an_r_squared_of_one() -> None:
    straight = GrowthRow("wanda", "layers", [1, 2, 4], [1.5, 2.0, 3.0])
    assert straight.slope == pytest.approx(0.5)
    assert straight.r_squared == pytest.approx(1.0)
    assert GrowthRow("wanda", "layers", [1, 2, 4], [1.0, 4.0, 16.0]).r_squared < 0.99


def test_a_ratio_that_reaches_its_target_meets_it_and_a_smaller_one_misses_it() -> None:
    def row(seconds: float) -> PrunerRow:
        return PrunerRow("testbed", "wanda", seconds, 3.0, None, 1, 1.0, 1.0, None)

    mask = MaskRow(8, 8, seconds=1.0, plain_seconds=9.0, differing=0)
    assert [target.met for target in targets([row(1.0), row(1.1)], [mask])] == [True, False, False]
