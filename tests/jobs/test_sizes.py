import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jobs.sizes import checkpoint_parameters
from pipeline.hub import model_item, used
from pipeline.specs import HubModel, LocalModel


@pytest.fixture(params=[False, True], ids=["own-head", "tied-head"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=request.param,
        )
    ).to(torch.bfloat16)


def size(model: LlamaForCausalLM) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_safetensors_are_counted_whole_and_in_shards(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for name in ("whole", "shards"):
        assert checkpoint_parameters(LocalModel(path=str(tmp_path / name))) == size(model)


def test_a_copy_of_the_weights_in_one_more_file_is_not_counted(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    (tmp_path / "consolidated.safetensors").write_bytes(file.read_bytes())
    assert checkpoint_parameters(LocalModel(path=str(tmp_path))) == size(model)


def test_pickles_are_counted_by_their_bytes_and_dtype(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    found = checkpoint_parameters(LocalModel(path=str(tmp_path), allow_pickle=True))
    assert found is not None
    bytes_ = (tmp_path / "pytorch_model.bin").stat().st_size
    assert found == bytes_ / 2  # bfloat16


def test_a_configuration_alone_gives_the_number_of_parameters(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    model.config.save_pretrained(tmp_path)
    assert checkpoint_parameters(LocalModel(path=str(tmp_path))) == size(model)


def test_with_missing_shards_the_configuration_gives_the_number(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    max(tmp_path.glob("*.safetensors")).unlink()
    assert checkpoint_parameters(LocalModel(path=str(tmp_path))) == size(model)


def test_hub_models_are_found_in_the_hubs_cache_and_among_copies(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = HubModel(name="someone/small")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert checkpoint_parameters(hub) is None
    model.save_pretrained(tmp_path / "copy")
    with used({model_item(hub): tmp_path / "copy"}):
        assert checkpoint_parameters(hub) == size(model)
    commit = "0" * 40
    repository = tmp_path / "models--someone--small"
    model.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert checkpoint_parameters(hub) == size(model)
    assert checkpoint_parameters(HubModel(name="someone/small", revision="other")) is None


@pytest.mark.parametrize("content", ["", "{}", '{"weight_map": {"a": "gone.safetensors"}}'])
def test_the_number_is_none_without_any_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    (tmp_path / "config.json").write_text("{}")
    assert checkpoint_parameters(LocalModel(path=str(tmp_path))) is None
    assert checkpoint_parameters(LocalModel(path=str(tmp_path / "nowhere"))) is None


def test_headers_are_read_without_torch(tmp_path: Path, model: LlamaForCausalLM) -> None:
    model.save_pretrained(tmp_path)
    lines = (
        "import sys",
        "from jobs.plan import checkpoint_parameters",
        "from pipeline.specs import LocalModel",
        f"print(checkpoint_parameters(LocalModel(path={str(tmp_path)!r})), 'torch' in sys.modules)",
    )
    program = [sys.executable, "-c", "\n".join(lines)]
    printed = subprocess.run(program, check=True, capture_output=True, text=True).stdout
    assert printed.split() == [str(float(size(model))), "False"]
