"""The benchmarks of a real model, run on a tiny one."""

import sysconfig
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from safetensors.torch import save_file
from transformers import AutoTokenizer

from benchmarks import real
from benchmarks.baseline import sampling as plain
from benchmarks.llm_compressor import compare
from benchmarks.makespan import makespan_ratio
from benchmarks.real_model import (
    forward_seconds,
    measure_bfloat16,
    measure_generation,
    measure_reconstruction,
    measure_scoring,
    on_cpu,
    real_windows,
)
from benchmarks.tables import targets_table
from benchmarks.targets import Target
from cluster.store import Manifest, Store
from pipeline.models.loading import load_model
from pipeline.specs import LocalModel

PREFIXES = [[5, 6], [7, 8], [9, 10]]


@pytest.fixture(scope="module")
def folder(tiny_model_folder: Path) -> Path:
    return tiny_model_folder / "model"


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return on_cpu(folder)


@pytest.fixture(scope="module")
def windows(folder: Path) -> torch.Tensor:
    return real_windows(AutoTokenizer.from_pretrained(folder), 3, 32)


def by_name(found: list[Target]) -> dict[str, float]:
    return {target.what: target.reached for target in found}


# --------------------------------------------------------------------------------- the plain way


def test_the_plain_draw_inverts_the_cumulative_distribution() -> None:
    probabilities = torch.tensor([0.25, 0.0, 0.5, 0.25], dtype=torch.float64)
    uniforms = torch.tensor([0.0, 0.24, 0.26, 0.74, 0.76, 0.999], dtype=torch.float64)
    drawn = plain.draw_tokens(probabilities.log().expand(6, 4), uniforms)
    assert drawn.flatten().tolist() == [0, 0, 2, 2, 3, 3]


def test_the_plain_penalty_applies_once_to_each_token_of_the_text() -> None:
    scores = torch.tensor([[2.0, -2.0, 1.0]])
    penalised = plain.penalise(torch.tensor([[0, 1, 0]]), scores, 2.0)
    assert penalised.tolist() == [[1.0, -4.0, 1.0]]


def test_the_engine_draws_the_same_tokens_as_the_plain_way(model: Any) -> None:
    assert (
        by_name(measure_generation(model, PREFIXES, 12, 1))["generation: share of equal samples"]
        == 1.0
    )


def test_a_different_choice_of_tokens_shows_in_the_share_of_equal_samples(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "draw_tokens", lambda scores, _: scores.argmin(dim=-1, keepdim=True))
    assert (
        by_name(measure_generation(model, PREFIXES, 12, 1))["generation: share of equal samples"]
        == 0.0
    )


# -------------------------------------------------------------------------------------- measuring


def test_forward_passes_are_timed_inside_the_context_only(model: Any) -> None:
    ids = torch.tensor([[1, 2, 3]])
    with forward_seconds(model) as seconds:
        model(ids)
        model(ids)
    model(ids)
    assert len(seconds) == 2
    assert min(seconds) > 0


def test_choosing_a_token_takes_a_share_of_a_step(model: Any) -> None:
    found = by_name(measure_generation(model, PREFIXES, 12, 1))
    assert 0 < found["generation: share of choosing a token"] < 1
    assert found["generation: tokens/s"] > 0


def test_scoring_is_compared_with_the_forward_pass(model: Any, windows: torch.Tensor) -> None:
    found = measure_scoring(model, windows, 1)
    assert all(target.reached > 0 for target in found)
    assert [target.at_most for target in found] == [False, True, True]


def test_reconstruction_is_compared_with_its_forward_passes(
    folder: Path, windows: torch.Tensor
) -> None:
    (target,) = measure_reconstruction(folder, windows, 1)
    assert target.at_most
    assert target.reached > 0


def test_bfloat16_has_a_target_only_on_a_cpu_with_amx(
    folder: Path, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for amx, wanted in ((True, 1.8), (False, None)):
        monkeypatch.setattr("benchmarks.real_model.has_amx", lambda amx=amx: amx)
        (_, ratio) = measure_bfloat16(folder, windows, 1)
        assert ratio.wanted == wanted
        assert ratio.reached > 0


def test_windows_hold_text_of_the_standard_library(folder: Path, windows: torch.Tensor) -> None:
    first = min(Path(sysconfig.get_path("stdlib")).glob("*.py")).read_text(encoding="utf-8")
    expected = AutoTokenizer.from_pretrained(folder)(first)["input_ids"]
    assert windows.flatten().tolist() == expected[: 3 * 32]


def test_a_folder_without_a_model_is_an_error_that_names_the_command_to_make_one(
    tmp_path: Path,
) -> None:
    with pytest.raises(typer.BadParameter, match="python -m jobs prepare"):
        real.main(model=tmp_path / "model")


# ----------------------------------------------------------------------------------- the verdicts


def test_a_target_is_a_lower_bound_an_upper_bound_or_none() -> None:
    targets = [
        Target("least", 2.0, 2.0),
        Target("most", 1.4, 1.5, at_most=True),
        Target("shown", None, 7.0),
    ]
    assert [target.met for target in targets] == [True, False, None]
    text = StringIO()
    Console(file=text, width=100).print(targets_table(targets))
    lines = [line.split() for line in text.getvalue().splitlines()]
    assert ["│", "most", "│", "at", "most", "1.40", "│", "1.50", "│", "missed", "│"] in lines
    assert ["│", "shown", "│", "│", "7.00", "│", "│"] in lines


def finish(store: Store, key: str, start: float, end: float) -> None:
    manifest = Manifest(
        key=key,
        kind="score",
        spec={},
        data=f"data/{key}",
        files={},
        report={},
        seconds=end - start,
        peak_memory_bytes=None,
        versions={},
        host="here",
        finished=end,
    )
    store.write(f"manifests/{key}.json", manifest.model_dump_json().encode())


def test_a_run_without_gaps_has_a_makespan_of_one_and_idle_cpus_add_to_it(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for key, start, end in (("a", 100, 110), ("b", 100, 104), ("c", 104, 110)):
        finish(store, key, start, end)
    assert makespan_ratio(str(tmp_path), 2) == pytest.approx(1.0)
    finish(store, "d", 110, 120)  # on one CPU, the other idle
    assert makespan_ratio(str(tmp_path), 2) == pytest.approx(20 / 15)


def test_the_makespan_of_an_empty_store_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no artifact"):
        makespan_ratio(str(tmp_path), 2)


# --------------------------------------------------------------------------------- llm-compressor


def other_python(path: Path, body: str) -> Path:
    """Write a stand-in for the Python of llm-compressor's environment. Its arguments are
    `theirs.py` and the options; the last one is the result's path, `$output`."""
    path.write_text(f"#!/bin/sh\nfor output; do :; done\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.mark.whole_run
def test_both_prune_the_same_windows_and_their_cpu_seconds_are_compared(
    tmp_path: Path, folder: Path, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "FASTER_THAN_LLM_COMPRESSOR", {("sparsegpt", "2:4"): 2.0})
    result = '{"cpu_seconds": 1000, "sparsity": 0.5}'
    python = other_python(tmp_path / "python", f"echo '{result}' > $output")
    ours, theirs, ratio, limit = compare.compare_cpu_seconds(python, folder, windows, 1)
    assert theirs.reached == 1000
    assert 0 < ours.reached < 60
    assert ratio == Target("sparsegpt 2:4: times llm-compressor", 2.0, 1000 / ours.reached)
    assert limit.reached > ratio.reached  # nothing is quicker than its matrix products


def test_a_change_twice_as_large_has_four_times_the_error(
    tmp_path: Path, folder: Path, windows: torch.Tensor
) -> None:
    dense = load_model(LocalModel(path=str(folder), dtype="float32"), {}, torch.device("cpu"))
    draws = torch.Generator().manual_seed(0)
    changes = {
        name: torch.randn(each.weight.shape, generator=draws)
        for name, each in dense.model.layers.named_modules(prefix="model.layers")
        if isinstance(each, torch.nn.Linear)
    }
    files = {size: tmp_path / f"{size}.safetensors" for size in (2, 1)}
    for size, path in files.items():
        own = {n: dense.get_submodule(n).weight + size * each for n, each in changes.items()}
        save_file(own, path)
    found = compare.error_ratios(folder, windows, *files.values())
    assert found == pytest.approx((4, 4, 4), rel=1e-3)


def test_pruning_another_share_than_half_is_an_error(
    tmp_path: Path, folder: Path, windows: torch.Tensor
) -> None:
    result = '{"cpu_seconds": 1, "sparsity": 0.4}'
    python = other_python(tmp_path / "python", f"echo '{result}' > $output")
    with pytest.raises(RuntimeError, match=r"0\.4000 of the weights"):
        compare.compare_cpu_seconds(python, folder, windows, 1)


def test_the_output_of_a_failed_process_is_printed(
    tmp_path: Path, folder: Path, windows: torch.Tensor, capfd: pytest.CaptureFixture[str]
) -> None:
    python = other_python(tmp_path / "python", "echo no module of that name; exit 3")
    with pytest.raises(Exception, match="exit status 3"):
        compare.compare_cpu_seconds(python, folder, windows, 1)
    assert "no module of that name" in capfd.readouterr().err
