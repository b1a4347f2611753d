"""The script for a GPU, run on a CPU, so that its faults show without a GPU."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import GpuPart, GpuReport

WITHOUT = """
import sys
for absent in ("ray", "vllm", "lm_eval", "cluster", "jobs", "analysis"):
    sys.modules[absent] = None  # an import of it fails
import typer
from benchmarks.gpu import main
typer.run(main)
"""


@pytest.mark.whole_run
def test_a_whole_run_needs_neither_ray_nor_vllm_and_writes_every_part(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--small", "--output", str(output)]
    subprocess.run([sys.executable, "-c", WITHOUT, *arguments], check=True, capture_output=True)
    written = json.loads(output.read_text())
    assert written["failed"] == {}
    assert written["skipped"] == ["2:4 products: torch has 2:4 products on CUDA only"]
    assert [row["pruner"] for row in written["pruners"]] == ["wanda", "dsnot", "sparsegpt"]
    shown = {figure["what"]: figure["reached"] for figure in written["figures"]}
    assert shown["scoring: share of the matrix rate"] > 0
    assert shown["generation: share of equal samples"] == 1.0


def test_two_to_four_products_are_measured_on_weights_with_that_pattern(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed: list[torch.Tensor] = []

    def pack(weight: torch.Tensor) -> torch.Tensor:  # torch's own needs CUDA
        packed.append(weight)
        return weight

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", pack)
    found = gpu.measure_two_to_four(gpu.TINY, torch.device("cpu"), torch.bfloat16)
    assert len(packed) == len({shape for group in gpu.TINY.matrices for shape in group})
    for weight in packed:
        assert (weight.reshape(-1, 4) != 0).sum(dim=1).eq(2).all()
    assert len(found) == 3 * len(packed)
    assert all(target.reached > 0 for target in found)


def run(parts: list[GpuPart]) -> tuple[GpuReport, list[Any]]:
    report, saved = GpuReport({}), []
    gpu.run_parts(parts, report, lambda: saved.append(list(report.seconds)))
    return report, saved


def test_a_failed_part_leaves_its_traceback_and_the_next_part_runs() -> None:
    def fails(report: GpuReport) -> None:
        raise RuntimeError("out of memory")

    report, saved = run([GpuPart("one", 1.0, fails), GpuPart("two", 1.0, lambda report: None)])
    assert list(report.failed) == ["one"]
    assert "out of memory" in report.failed["one"]
    assert saved == [["one"], ["one", "two"]]


def test_a_part_that_would_overrun_the_budget_is_skipped_and_a_shorter_one_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "RUN_SECONDS", 50.0)
    ran: list[str] = []
    parts = [
        GpuPart(name, seconds, lambda report, name=name: ran.append(name))
        for name, seconds in (("long", 60.0), ("short", 10.0))
    ]
    report, _ = run(parts)
    assert ran == ["short"]
    assert report.skipped == ["long: 50 s were left of 50"]
