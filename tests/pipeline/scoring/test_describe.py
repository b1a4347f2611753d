from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from transformers import AutoModelForCausalLM

from pipeline.scoring.describe import divergence, frequencies, run
from pipeline.specs import DescribeSpec, PretrainSpec, TestbedCorpus, WindowsSpec

MODEL = PretrainSpec(mixture={"facts": 1})
CORPUS = TestbedCorpus(mixture={"facts": 1})


def windows_of(ids: torch.Tensor, folder: Path) -> Path:
    folder.mkdir()
    column = pa.array(ids.tolist(), type=pa.list_(pa.int32()))
    pq.write_table(pa.table({"token_ids": column}), folder / "windows.parquet")
    return folder


@pytest.fixture
def drawn() -> torch.Tensor:
    return torch.randint(5, 900, (6, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("memory", [{}, {"memory_bytes": 1}], ids=["whole", "by layer"])
def test_the_report_has_the_means_over_windows_of_the_models_scores(
    drawn: torch.Tensor, tiny_model_folder: Path, tmp_path: Path, memory: dict[str, int]
) -> None:
    calibration = WindowsSpec(source=CORPUS, model=MODEL, nsamples=6, seqlen=24)
    spec = DescribeSpec(calibration=calibration, model=MODEL)
    artifacts = {calibration.key: windows_of(drawn, tmp_path / "set"), MODEL.key: tiny_model_folder}
    (tmp_path / "out").mkdir()
    report = run(spec, artifacts, tmp_path / "out", **memory)
    assert report.get("streamed", False) == bool(memory)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder / "model").double().eval()
    with torch.inference_mode():
        probabilities = model(drawn).logits[:, :-1].log_softmax(-1)
    losses = -probabilities.gather(2, drawn[:, 1:, None]).squeeze(2).mean(dim=1).numpy()
    assert report["windows"] == 6
    assert report["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert report["loss_error"] == pytest.approx(losses.std(ddof=1) / 6**0.5, rel=1e-3)
    different = [len(set(row[1:].tolist())) / 23 for row in drawn]
    assert report["distinct_1"] == pytest.approx(np.mean(different))
    assert report["min_k"] < -report["loss"]
    assert not {"divergence", "missing_mass", "reference_distance"} & report.keys()
    assert len(pq.read_table(tmp_path / "out" / "scores.parquet")) == 6


def test_the_mean_over_one_window_has_no_standard_error(
    drawn: torch.Tensor, tiny_model_folder: Path, tmp_path: Path
) -> None:
    calibration = WindowsSpec(source=CORPUS, model=MODEL, nsamples=1, seqlen=24)
    windows = windows_of(drawn[:1], tmp_path / "set")
    (tmp_path / "out").mkdir()
    spec = DescribeSpec(calibration=calibration, model=MODEL)
    artifacts = {calibration.key: windows, MODEL.key: tiny_model_folder}
    report = run(spec, artifacts, tmp_path / "out")
    assert report["windows"] == 1
    assert report["loss"] > 0
    assert report["loss_error"] is None


def test_text_like_the_reference_diverges_less(
    drawn: torch.Tensor, tiny_model_folder: Path, tmp_path: Path
) -> None:
    near = WindowsSpec(source=CORPUS, model=MODEL, nsamples=6, seqlen=24)
    far = near.model_copy(update={"seed": 1})
    reference = near.model_copy(update={"seed": 2})
    artifacts = {
        near.key: windows_of(drawn, tmp_path / "near"),
        far.key: windows_of(drawn % 50 + 5, tmp_path / "far"),
        reference.key: windows_of(drawn.flip(0), tmp_path / "reference"),
        MODEL.key: tiny_model_folder,
    }
    described = DescribeSpec(calibration=reference, model=MODEL)
    (output := tmp_path / "reference-out").mkdir()
    assert run(described, artifacts, output)["windows"] == 6
    artifacts[described.key] = output
    reports = {}
    for name, calibration in (("near", near), ("far", far)):
        (output := tmp_path / f"{name}-out").mkdir()
        spec = DescribeSpec(calibration=calibration, model=MODEL, reference=reference)
        assert {stage.key for stage in spec.inputs()} <= artifacts.keys()
        reports[name] = run(spec, artifacts, output)
    assert reports["near"]["divergence"] == reports["near"]["missing_mass"] == 0.0
    assert reports["near"]["reference_distance"] == pytest.approx(0.0, abs=1e-4)
    assert reports["far"]["divergence"] > 0.3
    assert reports["far"]["missing_mass"] > 0.5
    assert reports["far"]["reference_distance"] > 0.3
    assert reports["far"]["token_entropy"] < reports["near"]["token_entropy"]
    assert 1 < reports["near"]["effective_directions"] <= 5
    for length in (1, 2, 3):
        runs = drawn.unfold(1, length, 1).flatten(0, 1)
        share = len(runs.unique(dim=0)) / len(runs)
        assert reports["near"][f"set_distinct_{length}"] == pytest.approx(share)


def test_divergence_is_the_jensen_shannon_divergence() -> None:
    draws = np.random.default_rng(0)
    first, second = draws.dirichlet(np.ones(40)), draws.dirichlet(np.ones(40))
    assert divergence(first, second) == pytest.approx(jensenshannon(first, second, base=2) ** 2)
    assert divergence(np.array([1.0]), np.array([0.0, 1.0])) == pytest.approx(1.0)
    assert divergence(first, first) == 0.0


def test_frequencies_are_shares_of_all_tokens() -> None:
    assert frequencies(torch.tensor([[0, 2], [2, 2]])).tolist() == [0.25, 0.0, 0.75]
