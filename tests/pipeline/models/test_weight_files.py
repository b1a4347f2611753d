"""Faulty checkpoints, found by their files and when they are loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import InputError
from pipeline.evaluation.evaluate import run as evaluate
from pipeline.generation.transformers_engine import TransformersEngine
from pipeline.models.inspection import inspect_model
from pipeline.models.loading import load_model, stream_model
from pipeline.models.weight_files import check_tensors
from pipeline.pruning.prune import run
from pipeline.specs import (
    EvaluateSpec,
    FileCorpus,
    LocalModel,
    Magnitude,
    PerplexitySpec,
    PruneSpec,
)
from tests.pipeline.models.test_architectures import CONFIGS

NORM = "model.layers.1.post_attention_layernorm.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 269060552\n"

Damage = Callable[[Path], None]


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint of the testbed, which tests damage."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(tiny_model_folder / "model", copy)
    return copy


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def in_shards(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")


def refusals(folder: Path, scratch: Path, **fields: Any) -> list[str]:
    """Return the errors of planning, loading and streaming a checkpoint."""
    spec = LocalModel(path=str(folder), dtype="float32", **fields)
    messages = []
    for look in (
        lambda: inspect_model(spec),
        lambda: load_model(spec, {}),
        lambda: stream_model(spec, {}, scratch),
    ):
        with pytest.raises(InputError) as refused:
            look()
        messages.append(str(refused.value))
    return messages


# ---------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_checkpoint_is_complete_and_without_any_one_tensor_refused(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"

    def skeleton() -> Any:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)

    assert list(check_tensors("here", [file], skeleton())) == []
    tensors = load_file(file)
    for lost in list(tensors)[:: max(1, len(tensors) // 6)]:
        rest = {key: value for key, value in tensors.items() if key != lost}
        save_file(rest, tmp_path / "rest.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=r"here.*(lacks|by config.json)"):
            check_tensors("here", [tmp_path / "rest.safetensors"], skeleton())


@pytest.mark.parametrize("lost", ["lm_head.weight", NORM, "model.layers.0.mlp.up_proj.weight"])
def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_its_name(
    folder: Path, tmp_path: Path, lost: str
) -> None:
    rewrite(folder, lambda tensors: tensors.pop(lost))
    for message in refusals(folder, tmp_path / "scratch"):
        assert f"lacks {lost}: the checkpoint is incomplete" in message


def test_a_pickle_that_lacks_a_tensor_is_refused_when_it_is_loaded(
    folder: Path, tmp_path: Path
) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    del tensors[NORM]
    torch.save(tensors, folder / "pytorch_model.bin")
    spec = LocalModel(path=str(folder), dtype="float32", allow_pickle=True)
    for load in (lambda: load_model(spec, {}), lambda: stream_model(spec, {}, tmp_path / "s")):
        with pytest.raises(InputError, match=f"lacks {NORM}"):
            load()


def test_a_tensor_of_another_shape_is_refused_with_both(folder: Path, tmp_path: Path) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        tensors[NORM] = torch.ones(len(tensors[NORM]) + 2)

    width = len(load_file(folder / "model.safetensors")[NORM])
    rewrite(folder, widen)
    for message in refusals(folder, tmp_path / "scratch"):
        assert f"{NORM} is [{width + 2}], but [{width}] by config.json" in message


def test_tensors_that_the_model_does_not_use_are_named_and_harmless(
    folder: Path, tmp_path: Path
) -> None:
    spec = LocalModel(path=str(folder), dtype="float32")
    before = load_model(spec, {}, torch.device("cpu")).state_dict()
    rewrite(folder, lambda tensors: tensors.update({"vision.patch.weight": torch.ones(3)}))
    inspected = inspect_model(spec)
    assert inspected is not None
    loaded = load_model(spec, {}, torch.device("cpu"))
    streamed = stream_model(spec, {}, tmp_path / "scratch", torch.device("cpu"))
    for named in (
        inspected.unexpected_tensors,
        *(m.unexpected_tensors for m in (loaded, streamed)),
    ):
        assert list(named) == ["vision.patch.weight"]
    assert all(torch.equal(before[name], value) for name, value in loaded.state_dict().items())
    assert TransformersEngine(loaded).facts["unexpected_tensors"] == ["vision.patch.weight"]
    (tmp_path / "pruned").mkdir()
    report = run(PruneSpec(model=spec, pruner=Magnitude(), sparsity=0.5), {}, tmp_path / "pruned")
    assert report["unexpected_tensors"] == ["vision.patch.weight"]
    (tmp_path / "text.txt").write_text("some text to be read " * 20)
    text = FileCorpus(path=str(tmp_path / "text.txt"))
    asked = PerplexitySpec(name="text", corpus=text, seqlen=8, max_windows=2)
    (tmp_path / "evaluated").mkdir()
    report = evaluate(EvaluateSpec(model=spec, perplexity=(asked,)), {}, tmp_path / "evaluated")
    assert report["unexpected_tensors"] == ["vision.patch.weight"]


def test_shards_are_read_by_their_index(folder: Path) -> None:
    in_shards(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    inspected = inspect_model(LocalModel(path=str(folder)))
    assert inspected is not None
    assert list(inspected.unexpected_tensors) == []


# ------------------------------------------------------------------------------------------ files


def emptied(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def as_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(POINTER)


def tokenizer_as_pointer(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(POINTER)


def one_shard_as_pointer(folder: Path) -> None:
    in_shards(folder)
    min(folder.glob("*.safetensors")).write_bytes(POINTER)


def without_a_shard(folder: Path) -> None:
    in_shards(folder)
    min(folder.glob("*.safetensors")).unlink()


def without_the_index(folder: Path) -> None:
    in_shards(folder)
    (folder / "model.safetensors.index.json").unlink()


def with_a_broken_index(folder: Path) -> None:
    in_shards(folder)
    (folder / "model.safetensors.index.json").write_text("{")


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def as_gguf(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-Q4_K_M.gguf")


def gguf_alone(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "model-Q4_K_M.gguf").touch()


def as_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "gpt2"}')


def configured(**fields: Any) -> Damage:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


def quantized(method: str, **fields: Any) -> Damage:
    return configured(quantization_config={"quant_method": method, **fields})


def in_float8(folder: Path) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)

    rewrite(folder, halve)


def packed(folder: Path) -> None:
    """GPTQ's form before it had an entry in config.json."""

    def pack(tensors: dict[str, Tensor]) -> None:
        weight = tensors.pop("model.layers.0.mlp.up_proj.weight")
        tensors["model.layers.0.mlp.up_proj.qweight"] = weight[:, ::8].int().contiguous()
        tensors["model.layers.0.mlp.up_proj.scales"] = torch.ones(1, len(weight))

    rewrite(folder, pack)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (emptied, "has no weights: it needs model.safetensors"),
        (as_pointer, "model.safetensors: Git LFS pointers, not the files: run `git lfs pull`"),
        (tokenizer_as_pointer, "tokenizer.json: Git LFS pointers"),
        (one_shard_as_pointer, "model-00001-of-"),
        (without_a_shard, "index.json names files that are missing: model-00001-of-"),
        (without_the_index, "neither model.safetensors nor model.safetensors.index.json"),
        (with_a_broken_index, "is no index of weights: fetch it again"),
        (cut_short, "model.safetensors is damaged or cut short"),
        (as_gguf, "GGUF only: take the original checkpoint, or convert model-Q4_K_M.gguf"),
        (gguf_alone, "GGUF only: take the original checkpoint, or convert model-Q4_K_M.gguf"),
        (as_adapter, "holds a PEFT adapter"),
        (quantized("gptq", bits=4), "its weights are quantized (gptq)"),
        (quantized("awq", bits=4), "its weights are quantized (awq)"),
        (quantized("fp8"), "its weights are quantized (fp8)"),
        (quantized("compressed-tensors"), "its weights are quantized (compressed-tensors)"),
        (quantized("bitsandbytes", load_in_4bit=True), "its weights are quantized (bitsandbytes)"),
        (in_float8, "model.layers.0.mlp.up_proj.weight is stored as F8_E4M3"),
        (packed, "lacks model.layers.0.mlp.up_proj.weight: the checkpoint looks quantized"),
        (
            configured(intermediate_size=40),
            "is [64, 192], but [64, 40] by config.json, and 5 more: fetch both",
        ),
        (configured(model_type="t5", d_model=32), "is an encoder-decoder model"),
        (configured(model_type="bert"), "is an encoder (is_decoder: false)"),
        (configured(model_type="vit"), "cannot be loaded: Unrecognized configuration class"),
    ],
)
def test_a_checkpoint_that_cannot_be_pruned_is_refused_in_one_line(
    folder: Path, tmp_path: Path, damage: Damage, message: str
) -> None:
    damage(folder)
    for found in refusals(folder, tmp_path / "scratch"):
        assert message in found
        assert len(found) - len(str(folder)) < 220
        assert "\n" not in found


def test_an_unread_pointer_file_is_accepted(folder: Path) -> None:
    for name in ("pytorch_model.bin", "model-Q4_K_M.gguf", "consolidated.safetensors"):
        (folder / name).write_bytes(POINTER)
    assert inspect_model(LocalModel(path=str(folder))) is not None


def test_a_file_instead_of_a_folder_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="is a file: give the folder that it is in"):
        inspect_model(LocalModel(path=str(folder / "model.safetensors")))
