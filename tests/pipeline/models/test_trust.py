"""Code and pickles of a checkpoint do not run unless the grid allows it for that model."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import InputError
from pipeline.models.inspection import inspect_model
from pipeline.models.loading import load_model, load_tokenizer, stream_model
from pipeline.specs import EvaluateSpec, LocalModel, PerplexitySpec, TestbedCorpus


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> object:
        return Path.touch, (self.marker,)


@pytest.fixture
def checkpoint(tiny_model_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_model_folder / "model", folder)
    return folder


@pytest.fixture
def pickled(checkpoint: Path) -> Path:
    """The same checkpoint with weights in a pickle."""
    weights = load_file(checkpoint / "model.safetensors")
    torch.save(weights, checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    return checkpoint


def test_pickled_weights_are_refused_when_a_grid_is_planned_and_when_they_are_loaded(
    pickled: Path, tmp_path: Path
) -> None:
    spec = LocalModel(path=str(pickled), dtype="float32")
    for load in (
        lambda: inspect_model(spec),
        lambda: load_model(spec, {}),
        lambda: stream_model(spec, {}, tmp_path / "scratch"),
    ):
        with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle.*allow_pickle: true"):
            load()


def test_pickled_weights_that_the_grid_allows_are_those_that_were_pickled(pickled: Path) -> None:
    spec = LocalModel(path=str(pickled), dtype="float32", allow_pickle=True)
    weights = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    loaded = load_model(spec, {}, torch.device("cpu")).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


def test_a_pickle_beside_safetensors_is_not_opened(checkpoint: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for name in ("pytorch_model.bin", "training_args.bin"):
        (checkpoint / name).write_bytes(pickle.dumps(Bomb(marker)))
    for allowed in (False, True):
        load_model(LocalModel(path=str(checkpoint), allow_pickle=allowed), {})
    assert not marker.exists()
    pickle.loads((checkpoint / "training_args.bin").read_bytes())
    assert marker.exists()


@pytest.fixture
def with_code(checkpoint: Path, tmp_path: Path) -> Path:
    """The same checkpoint with a configuration of its own, which notes that it was run."""
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {}}
    config["auto_map"] |= {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n"
        "    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n"
        "    config_class = OwnConfig\n"
    )
    return checkpoint


def test_code_that_comes_with_a_model_is_not_run(with_code: Path, tmp_path: Path) -> None:
    spec = LocalModel(path=str(with_code))
    for load in (
        lambda: inspect_model(spec),
        lambda: load_model(spec, {}),
        lambda: stream_model(spec, {}, tmp_path / "scratch"),
    ):
        with pytest.raises(InputError, match="trust_remote_code: true for this model"):
            load()
    load_tokenizer(spec, {})  # has no code of its own, and needs none of the model's
    assert not (tmp_path / "ran").exists()


def test_code_that_the_grid_trusts_is_run(
    with_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    found = inspect_model(LocalModel(path=str(with_code), trust_remote_code=True))
    assert type(found.config).__name__ == "OwnConfig"
    assert (tmp_path / "ran").exists()


def test_trust_is_part_of_a_result_and_its_absence_changes_no_key() -> None:
    def key(**fields: bool) -> str:
        perplexity = PerplexitySpec(name="p", corpus=TestbedCorpus(mixture={"fact": 1.0}), seqlen=8)
        model = LocalModel(path="/m", **fields)
        spec = EvaluateSpec(model=model, perplexity=(perplexity,))
        assert ("trust_remote_code" in json.dumps(spec.lineage)) == bool(fields)
        return spec.key

    assert key() != key(trust_remote_code=True)
