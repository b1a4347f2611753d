"""Several prunings in one process, against each in its own process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pipeline.data.windows import CalibrationWindow, write_windows
from pipeline.models import loading
from pipeline.pruning import shared_model
from pipeline.pruning.prune import run
from pipeline.specs import (
    DSnoT,
    FileCorpus,
    LocalModel,
    Magnitude,
    PruneSpec,
    SparseGPT,
    Wanda,
    WindowsSpec,
)
from tests.pipeline.models.test_layer_files import save_tokenizer
from tests.pipeline.models.test_streaming import CONFIGS, contents


@pytest.fixture(autouse=True)
def nothing_held() -> Iterator[None]:
    forget()
    yield
    forget()


def forget() -> None:
    shared_model._latest.forget()


def cells(model: LocalModel) -> list[PruneSpec]:
    def windows(seed: int) -> WindowsSpec:
        return WindowsSpec(source=FileCorpus(path="unread"), model=model, seed=seed)

    half = {"model": model, "sparsity": 0.5}
    return [
        PruneSpec(**half, pruner=Magnitude()),
        PruneSpec(**half, pruner=Wanda(), calibration=windows(0)),
        PruneSpec(model=model, sparsity=0.7, pruner=Wanda(), calibration=windows(0)),
        PruneSpec(**half, pruner=Wanda(), pattern="2:4", calibration=windows(0)),
        PruneSpec(**half, pruner=SparseGPT(), calibration=windows(0)),
        PruneSpec(model=model, sparsity=0.6, pruner=SparseGPT(), calibration=windows(0)),
        PruneSpec(**half, pruner=DSnoT(scope="all"), calibration=windows(0)),
        PruneSpec(**half, pruner=Wanda(), calibration=windows(1)),
    ]


@pytest.fixture(params=["llama", "mixtral"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> LocalModel:
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param])
    made.save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    return LocalModel(path=str(tmp_path / "dense"), dtype="float32")


def prune(spec: PruneSpec, folder: Path) -> dict[str, bytes]:
    artifacts = {}
    if spec.calibration is not None:
        data = folder.with_name(f"windows-{spec.calibration.seed}")
        if not data.exists():
            data.mkdir()
            generator = torch.Generator().manual_seed(spec.calibration.seed)
            ids = torch.randint(1, 96, (6, 24), generator=generator).numpy()
            write_windows([CalibrationWindow("none", 0, row) for row in ids], data)
        artifacts = {spec.calibration.key: data}
    folder.mkdir()
    run(spec, artifacts, folder)
    return contents(folder)


def test_cells_that_follow_each_other_leave_the_bytes_of_each_alone(
    model: LocalModel, tmp_path: Path
) -> None:
    together = [prune(spec, tmp_path / f"together-{n}") for n, spec in enumerate(cells(model))]
    for number, spec in enumerate(cells(model)):
        forget()
        assert prune(spec, tmp_path / f"alone-{number}") == together[number]


def test_a_model_is_loaded_once_for_prunings_that_follow_each_other(
    model: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    load = loading.load_streamed

    def counting_load(location: str, *rest: Any, **options: Any) -> Any:
        loads.append(location)
        return load(location, *rest, **options)

    monkeypatch.setattr(loading, "load_streamed", counting_load)
    for number, spec in enumerate(cells(model)):
        prune(spec, tmp_path / str(number))
    assert len(loads) == 1


def test_a_pruning_that_fails_leaves_nothing_to_the_next(model: LocalModel, tmp_path: Path) -> None:
    spec = cells(model)[1]
    undisturbed = prune(spec, tmp_path / "undisturbed")
    forget()

    class BreakError(Exception):
        pass

    class Keep:
        def keep(self, path: Path) -> None:
            if path.name == "layer-00001.safetensors":
                raise BreakError

        def restore(self, path: Path) -> bool:
            return False

    (tmp_path / "broken").mkdir()
    assert spec.calibration is not None
    artifacts = {spec.calibration.key: tmp_path / "windows-0"}
    with pytest.raises(BreakError):
        run(spec, artifacts, tmp_path / "broken", Keep())
    assert prune(spec, tmp_path / "after") == undisturbed


def test_a_model_that_is_loaded_whole_is_loaded_for_each_pruning(tmp_path: Path) -> None:
    made = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"])
    made.save_pretrained(tmp_path / "dense")
    spec = LocalModel(path=str(tmp_path / "dense"), dtype="float32")
    held = shared_model.shared_model(spec, {})
    assert shared_model.shared_model(spec, {}) is held
    vars(held.model.layers[0]).pop("stored_layer")  # as if its layers were in memory
    assert shared_model.shared_model(spec, {}) is held
    assert shared_model.shared_model(spec, {}) is not held
