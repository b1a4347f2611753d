"""Models whose decoder layers stay in their files until their turn comes."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from pipeline.models.checkpoint import INDEX, write_checkpoint
from pipeline.models.layer_files import apply_masks, layer_file
from pipeline.models.matrices import decoder_layers, matrices
from pipeline.models.streaming import load_streamed, read_ahead, resident
from pipeline.pruning.allocation import LayerTarget, ModelTarget
from pipeline.pruning.finished_layers import FinishedLayers
from pipeline.pruning.prune import prune_model, run
from pipeline.specs import Magnitude, Pruner, SparseGPT, Wanda
from tests.pipeline.models.test_layer_files import Dense, assert_same_bits, save_tokenizer

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GATED = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**GATED),
    "tied": transformers.LlamaConfig(**GATED, tie_word_embeddings=True),
    "gemma2": transformers.Gemma2Config(**GATED, head_dim=8, sliding_window=8),
    "opt": transformers.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32),
    "gpt2": transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2
    ),
    # experts are one tensor in memory and many, of other names, in the checkpoint
    "mixtral": transformers.MixtralConfig(**GATED, num_local_experts=4),
    "qwen3-moe": transformers.Qwen3MoeConfig(**GATED, **EXPERTS, tie_word_embeddings=True),
}


@pytest.fixture(params=CONFIGS)
def dense(request: pytest.FixtureRequest, tmp_path: Path) -> Dense:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param])
    model.save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    return Dense(tmp_path / "dense")


def in_memory(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def streamed(folder: Path, scratch: Path) -> Any:
    model = load_streamed(str(folder), torch.float32, torch.device("cpu"), scratch)
    return model.eval()


@pytest.mark.parametrize("pruner", [Wanda(), SparseGPT()], ids=lambda pruner: pruner.name)
def test_streamed_pruning_gives_the_same_bytes_as_in_memory(
    dense: Dense, tmp_path: Path, pruner: Pruner
) -> None:
    direct = in_memory(dense.folder)
    prune_model(direct, dense.windows(), pruner, ModelTarget(LayerTarget(0.5)))
    spec = dense.spec(dense.model(), pruner, sparsity=0.5)
    folder = dense.run(spec, {}, tmp_path / "run")[spec.key]
    if spec.stores_masks:
        rebuilt = in_memory(dense.folder)
        apply_masks(rebuilt, folder / "masks")
    else:
        rebuilt = in_memory(folder / "model")
    assert_same_bits(direct, rebuilt)
    data = dense.windows()
    assert torch.equal(direct(input_ids=data).logits, rebuilt(input_ids=data).logits)
    assert not (folder / "scratch").exists()


class KeepIn:
    """Keeps files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def keep(self, path: Path) -> None:
        shutil.copy(path, self.folder)

    def restore(self, path: Path) -> bool:
        kept = self.folder / path.name
        if kept.is_file():
            shutil.copy(kept, path)
        return kept.is_file()


@pytest.mark.parametrize("pruner", [Wanda(), SparseGPT()], ids=lambda pruner: pruner.name)
def test_layers_that_were_kept_give_the_bytes_of_an_undisturbed_run(
    dense: Dense, tmp_path: Path, pruner: Pruner
) -> None:
    spec = dense.spec(dense.model(), pruner, sparsity=0.5)
    whole = dense.run(spec, {}, tmp_path / "whole")
    keep = KeepIn(tmp_path / "kept")
    before = {key: folder for key, folder in whole.items() if key != spec.key}
    outputs = [tmp_path / "first", tmp_path / "second"]
    for output, resumed in zip(outputs, (0, 2), strict=True):
        output.mkdir()
        assert run(spec, before, output, keep)["resumed_layers"] == resumed
        (keep.folder / layer_file(2)).unlink()
    assert contents(outputs[0]) == contents(outputs[1]) == contents(whole[spec.key])


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_checkpoint_is_whole_and_holds_the_names_of_the_dense_one(
    dense: Dense, tmp_path: Path
) -> None:
    spec = dense.spec(dense.model(), Magnitude(), sparsity=0.5, checkpoint=True)
    folder = dense.run(spec, {}, tmp_path / "run")[spec.key] / "model"
    index = json.loads((folder / INDEX).read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    written = {name: load_file(folder / name) for name in files}
    assert index["weight_map"] == {
        name: file for file, tensors in written.items() for name in tensors
    }
    tensors = {name: tensor for part in written.values() for name, tensor in part.items()}
    before = load_file(dense.folder / "model.safetensors")
    assert {name: each.shape for name, each in tensors.items()} == {
        name: each.shape for name, each in before.items()
    }
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors.values()]
    assert index["metadata"]["total_size"] == sum(sizes)


def test_only_the_layer_at_work_is_in_memory(dense: Dense, tmp_path: Path) -> None:
    model = streamed(dense.folder, tmp_path / "scratch")
    whole = in_memory(dense.folder)
    root, layers = decoder_layers(model)
    inside = {name for name, _ in model.named_parameters() if name.startswith(f"{root}.")}
    assert absent(model) == inside
    wanted = dict(whole.named_parameters())
    for number, layer in enumerate(layers):
        with resident(layer):
            assert absent(model) == {
                name for name in inside if not name.startswith(f"{root}.{number}.")
            }
            for name, parameter in layer.named_parameters(prefix=f"{root}.{number}"):
                assert torch.equal(parameter, wanted[name]), name
            for matrix in matrices(f"{root}.{number}", layer):
                matrix.weight.zero_()  # is let go with the layer, and leaves the files alone
        assert absent(model) == inside
    for number, layer in enumerate(layers):
        with resident(layer):
            for name, parameter in layer.named_parameters(prefix=f"{root}.{number}"):
                assert torch.equal(parameter, wanted[name]), name


def test_a_layer_is_read_while_the_one_below_is_held(dense: Dense, tmp_path: Path) -> None:
    model = streamed(dense.folder, tmp_path / "scratch")
    _, layers = decoder_layers(model)
    _, whole = decoder_layers(in_memory(dense.folder))
    stored = vars(layers[1])["stored_layer"]
    reads: list[str] = []

    class Counted(dict[str, torch.Tensor]):
        def __init__(self, files: Mapping[str, torch.Tensor]) -> None:
            self.files = files

        def __getitem__(self, name: str) -> torch.Tensor:
            reads.append(threading.current_thread().name)
            return self.files[name]

    stored.parameters = {
        name: (Counted(files), key) for name, (files, key) in stored.parameters.items()
    }
    for _ in range(2):  # what was read ahead is used once
        with resident(layers[0]):
            read_ahead(layers, 1)
            read_ahead(layers, 1)
            stored.ahead.result(timeout=60)
        with resident(layers[1]):
            read_ahead(layers, 2)
            for name, parameter in layers[1].named_parameters():
                assert torch.equal(parameter, whole[1].get_parameter(name)), name
    assert len(reads) == 2 * len(stored.parameters)
    assert not any("MainThread" in name for name in reads)


def test_generation_settings_that_contradict_each_other_are_copied_unchanged(
    tmp_path: Path,
) -> None:
    """Vicuna's settings: transformers reads them but does not write them."""
    folder = tmp_path / "dense"
    transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]).save_pretrained(folder)
    save_tokenizer(folder)
    own = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": [2, 5]}
    (folder / "generation_config.json").write_text(json.dumps(own))
    dense = Dense(folder)
    updated = dense.spec(dense.model(), SparseGPT(), sparsity=0.5)
    artifacts = dense.run(updated, {}, tmp_path / "updated")
    masked = dense.spec(dense.model(), Wanda(), sparsity=0.5)
    write_checkpoint(masked, dense.run(masked, {}, tmp_path / "masked"), tmp_path / "exported")
    for checkpoint in (artifacts[updated.key] / "model", tmp_path / "exported"):
        written = json.loads((checkpoint / "generation_config.json").read_text())
        assert {name: written[name] for name in own} == own
        in_memory(checkpoint)


def absent(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.is_meta}


def test_layers_that_share_parameters_are_loaded_whole(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**GATED)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "dense")
    original = transformers.LlamaForCausalLM.__init__

    def shared(self: Any, config: Any) -> None:
        original(self, config)
        self.model.layers[2].mlp = self.model.layers[1].mlp

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.LlamaForCausalLM, "__init__", shared)
        loaded = streamed(tmp_path / "dense", tmp_path / "scratch")
    assert absent(loaded) == set()


def test_layers_are_released_when_pruning_fails(tmp_path: Path) -> None:
    transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]).save_pretrained(tmp_path)
    model = streamed(tmp_path, tmp_path / "scratch")
    before = absent(model)

    class Full(FinishedLayers):
        def save(self, *arguments: Any) -> None:
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        prune_model(
            model,
            None,
            Magnitude(),
            ModelTarget(LayerTarget(0.5)),
            finished=Full(tmp_path / "masks", masks=True),
        )
    assert absent(model) == before


# ----------------------------------------------------------------------------------------- memory

LAYERS = 40
MEASURED = """
import sys
import threading
from pathlib import Path
import torch
from cluster.memory import PeakMemory
from pipeline.pruning.prune import run
from pipeline.specs import PruneSpec

torch.set_num_threads(1)
small, large = (PruneSpec.model_validate_json(text) for text in sys.argv[1:3])
folders = [Path(name) for name in sys.argv[3:]]

def peak(spec, windows, output):
    output.mkdir(parents=True)
    artifacts = {} if spec.calibration is None else {spec.calibration.key: windows}
    with PeakMemory() as memory:
        run(spec, artifacts, output)
        return memory.peak()

print(peak(small, folders[0], folders[1] / "small"), peak(large, folders[0], folders[1] / "large"))
"""


@pytest.mark.whole_run
def test_a_model_is_pruned_in_much_less_memory_than_its_weights_take(tmp_path: Path) -> None:
    """Compare with the peak for a model of one layer, which is that of the interpreter and all
    libraries."""
    specs = []
    for name, layers in (("small", 1), ("large", LAYERS)):
        config = transformers.LlamaConfig(
            **{**GATED, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": layers}
        )
        torch.manual_seed(0)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        model = model.to_empty(device="cpu")
        for parameter in model.parameters():
            torch.nn.init.uniform_(parameter, -0.05, 0.05)
        model.save_pretrained(tmp_path / name, max_shard_size="50MB")
        save_tokenizer(tmp_path / name)
        dense = Dense(tmp_path / name)
        specs.append(dense.spec(dense.model(), Wanda(), sparsity=0.5, checkpoint=True))
    weights = sum(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    assert weights > 150e6
    windows = dense.write_windows(tmp_path / "windows")
    payloads = [spec.model_dump_json() for spec in specs]
    command = [sys.executable, "-c", MEASURED, *payloads, str(windows), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small, large = map(int, done.stdout.split())
    assert large - small < 0.18 * weights, f"{large - small} for {weights}"
    direct = in_memory(tmp_path / "large")
    prune_model(direct, dense.windows(), Wanda(), ModelTarget(LayerTarget(0.5)))
    assert_same_bits(direct, in_memory(tmp_path / "out/large/model"))
