"""The files of a pruned model, from which it is restored bit for bit."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn

from pipeline.models.layer_files import (
    LayerFileError,
    LayerRecord,
    apply_masks,
    layer_file,
    write_masks,
)
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.pruning.allocation import LayerTarget, ModelTarget
from pipeline.pruning.finished_layers import FinishedLayers
from pipeline.pruning.prune import prune_model, run
from pipeline.specs import (
    RIA,
    DSnoT,
    Dtype,
    FileCorpus,
    LocalModel,
    Magnitude,
    Pattern,
    Pruner,
    PruneSpec,
    SparseGPT,
    Wanda,
    WindowsSpec,
)

CONFIG = transformers.LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=36,  # 36 * 32 bits are whole bytes; a row of 36 ends within one
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


@dataclass(frozen=True)
class Dense:
    """A small checkpoint, and windows to prune it with."""

    folder: Path

    def windows(self) -> Tensor:
        return torch.randint(1, 96, (6, 16), generator=torch.Generator().manual_seed(3))

    def spec(self, model: Any, pruner: Pruner, **fields: Any) -> PruneSpec:
        windows = WindowsSpec(source=FileCorpus(path="unread"), model=model, nsamples=6, seqlen=16)
        calibration = windows if pruner.calibrated else None
        return PruneSpec(model=model, pruner=pruner, calibration=calibration, **fields)

    def model(self, dtype: Dtype = "float32") -> LocalModel:
        return LocalModel(path=str(self.folder), dtype=dtype)

    def write_windows(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        rows = pa.array(self.windows().tolist(), pa.list_(pa.int32()))
        pq.write_table(pa.table({"token_ids": rows}), folder / "windows.parquet")
        return folder

    def run(self, spec: PruneSpec, before: Mapping[str, Path], output: Path) -> dict[str, Path]:
        """Return the artifacts that later stages read."""
        artifacts = dict(before)
        if spec.calibration is not None:
            artifacts[spec.calibration.key] = self.write_windows(output / "windows")
        artifact = output / "artifact"
        artifact.mkdir(parents=True)
        run(spec, artifacts, artifact)
        return {**artifacts, spec.key: artifact}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Dense:
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIG)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data[0, ::3] = -0.0  # zeros that a pruner may or may not choose
            parameter.data[1, ::3] = 0.0
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return Dense(folder)


def save_tokenizer(folder: Path) -> None:
    vocabulary = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary).save_pretrained(folder)


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter as integers, in which -0.0 differs from 0.0."""
    integer = {4: torch.int32, 2: torch.int16}
    return {
        name: parameter.detach().view(integer[parameter.element_size()])
        for name, parameter in model.named_parameters()
    }


def assert_same_bits(one: nn.Module, two: nn.Module) -> None:
    left, right = bits(one), bits(two)
    assert left.keys() == right.keys()
    for name, weight in left.items():
        assert torch.equal(weight, right[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "pruner", [Magnitude(), Wanda(), DSnoT(scope="all")], ids=lambda pruner: pruner.name
)
def test_masks_give_back_the_pruned_model_bit_for_bit(
    dense: Dense, tmp_path: Path, dtype: Dtype, pruner: Pruner
) -> None:
    source = dense.model(dtype)
    spec = dense.spec(source, pruner, sparsity=0.3)
    artifacts = dense.run(spec, {}, tmp_path)
    direct = load_model(source, {})
    data = dense.windows() if pruner.calibrated else None
    prune_model(direct, data, pruner, ModelTarget(LayerTarget(0.3)))
    rebuilt = load_model(spec, artifacts)
    assert_same_bits(direct, rebuilt)
    negative = [bits(rebuilt)[name] for name in bits(rebuilt) if "down_proj" in name]
    smallest = torch.iinfo(negative[0].dtype).min
    kept = sum(int((weight == smallest).sum()) for weight in negative)
    assert kept > 0 or pruner.name == "magnitude"  # Wanda's rows have negative zeros to spare
    assert len(load_tokenizer(spec, artifacts)) == 2


def test_a_pruned_model_can_be_pruned_again_and_rests_on_all_before_it(
    dense: Dense, tmp_path: Path
) -> None:
    source = dense.model()
    first = dense.spec(source, Wanda(), sparsity=0.25)
    second = dense.spec(first, Magnitude(), sparsity=0.5, pattern="2:4")
    artifacts = dense.run(first, {}, tmp_path / "first")
    assert {spec.key for spec in second.inputs()} == {first.key}
    artifacts = dense.run(second, artifacts, tmp_path / "second")
    third = dense.spec(second, SparseGPT(), sparsity=0.6)
    assert {spec.key for spec in third.inputs()} == {
        second.key,
        first.key,
        third.calibration.key,  # type: ignore[union-attr]
    }
    fourth = dense.spec(third, Magnitude(), sparsity=0.6)
    assert {spec.key for spec in fourth.inputs()} == {third.key}  # a checkpoint of its own

    direct = load_model(source, {})
    prune_model(direct, dense.windows(), Wanda(), ModelTarget(LayerTarget(0.25)))
    prune_model(direct, None, Magnitude(), ModelTarget(LayerTarget(0.5, Pattern(2, 4))))
    assert_same_bits(direct, load_model(second, artifacts))
    artifacts = dense.run(third, artifacts, tmp_path / "third")
    artifacts = dense.run(fourth, artifacts, tmp_path / "fourth")
    prune_model(direct, dense.windows(), SparseGPT(), ModelTarget(LayerTarget(0.6)))
    prune_model(direct, None, Magnitude(), ModelTarget(LayerTarget(0.6)))
    assert_same_bits(direct, load_model(fourth, artifacts))


def test_a_checkpoint_that_is_asked_for_is_what_the_masks_give(
    dense: Dense, tmp_path: Path
) -> None:
    source = dense.model()
    masks = dense.spec(source, Wanda(), sparsity=0.5)
    whole = dense.spec(source, Wanda(), sparsity=0.5, checkpoint=True)
    assert masks.key != whole.key
    rebuilt = load_model(masks, dense.run(masks, {}, tmp_path / "masks"))
    folder = dense.run(whole, {}, tmp_path / "whole")[whole.key]
    assert sorted(path.name for path in folder.iterdir()) == [
        "dense.parquet",
        "model",
        "sparsity.parquet",
    ]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    assert_same_bits(rebuilt, loaded)
    assert_same_bits(rebuilt, load_model(whole, {whole.key: folder}))
    assert len(transformers.AutoTokenizer.from_pretrained(folder / "model")) == 2


def test_a_mask_takes_one_bit_a_weight(dense: Dense, tmp_path: Path) -> None:
    source = dense.model()
    spec = dense.spec(source, Magnitude(), sparsity=0.5)
    folder = dense.run(spec, {}, tmp_path)[spec.key]
    assert sorted(path.name for path in folder.iterdir()) == [
        "dense.parquet",
        "masks",
        "sparsity.parquet",
    ]
    for path in (folder / "masks").iterdir():
        tensors = load_file(path)
        assert len(tensors) == 7
        header = int.from_bytes(path.read_bytes()[:8], "little")
        weights = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 36
        assert path.stat().st_size == 8 + header + weights // 8
        assert header < 7 * 256


def test_the_order_in_which_a_pattern_holds_is_stored_with_the_masks(
    dense: Dense, tmp_path: Path
) -> None:
    pruner = RIA(permutation=True)
    spec = dense.spec(dense.model(), pruner, sparsity=0.5, pattern="2:4")
    artifacts = dense.run(spec, {}, tmp_path)
    direct = load_model(dense.model(), {})
    report = prune_model(
        direct, dense.windows(), pruner, ModelTarget(LayerTarget(0.5, Pattern(2, 4)))
    )
    assert_same_bits(direct, load_model(spec, artifacts))
    assert len(report.permutations) > 0
    stored = {
        name: tensor
        for number in range(2)
        for name, tensor in load_file(artifacts[spec.key] / "masks" / layer_file(number)).items()
        if name.endswith(".permutation")
    }
    assert stored.keys() == {f"{name}.permutation" for name in report.permutations}
    for name, order in report.permutations.items():
        assert torch.equal(stored[f"{name}.permutation"].long(), order)
    again = load_model(dense.model(), {})
    kept = FinishedLayers(artifacts[spec.key] / "masks", masks=True, keep=InPlace())
    resumed = prune_model(
        again, dense.windows(), pruner, ModelTarget(LayerTarget(0.5, Pattern(2, 4))), finished=kept
    )
    assert resumed.resumed_layers == 2
    assert resumed.matrices == report.matrices
    assert resumed.facts == report.facts
    assert resumed.permutations.keys() == report.permutations.keys()
    for name, order in report.permutations.items():
        assert torch.equal(resumed.permutations[name], order)


class InPlace:
    """Restores the files that exist, as if an earlier attempt had kept them."""

    def keep(self, path: Path) -> None:
        raise AssertionError(f"{path.name} is kept again")

    def restore(self, path: Path) -> bool:
        return path.is_file()


def test_bits_are_packed_row_by_row_from_the_highest(tmp_path: Path) -> None:
    mask = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    write_masks(tmp_path / "file", {"odd": mask}, LayerRecord({"odd": {"damping": 0.5}}))
    assert load_file(tmp_path / "file")["odd"].tolist() == [0b10000001, 0b11000000]
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {
            "matrices": '{"odd":{"columns":5,"facts":{"damping":0.5},"rows":2}}'
        }


def _spoil_shape(folder: Path) -> str:
    mask = torch.zeros(2, 2, dtype=torch.bool)
    layer = _masks(folder)
    layer["model.layers.1.mlp.up_proj"] = mask
    write_masks(folder / layer_file(1), layer, LayerRecord({name: {} for name in layer}))
    return r"up_proj is 2 x 2 here, and 36 x 32 in the model"


def _spoil_turned(folder: Path) -> str:
    layer = _masks(folder)
    name = "model.layers.1.mlp.up_proj"
    layer[name] = layer[name].T
    write_masks(folder / layer_file(1), layer, LayerRecord({name: {} for name in layer}))
    return r"up_proj is 32 x 36 here, and 36 x 32 in the model"


def _spoil_names(folder: Path) -> str:
    layer = _masks(folder)
    del layer["model.layers.1.mlp.up_proj"]
    write_masks(folder / layer_file(1), layer, LayerRecord({name: {} for name in layer}))
    return r"layer-00001.*lacks model\.layers\.1\.mlp\.up_proj \(1 in all\)"


def _spoil_more(folder: Path) -> str:
    layer = {**_masks(folder), "model.layers.1.mlp.extra": torch.zeros(2, 2, dtype=torch.bool)}
    write_masks(folder / layer_file(1), layer, LayerRecord({name: {} for name in layer}))
    return r"has too much: model\.layers\.1\.mlp\.extra"


def _spoil_bytes(folder: Path) -> str:
    path = folder / layer_file(1)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj"] = torch.zeros(3, dtype=torch.uint8)
    save_file(tensors, path, metadata=metadata)
    return r"the mask of model\.layers\.1\.mlp\.up_proj has 3 bytes for 1152 weights"


def _spoil_layers(folder: Path) -> str:
    (folder / layer_file(1)).unlink()
    return r"lacks layer-00001\.safetensors"


def _spoil_more_layers(folder: Path) -> str:
    (folder / layer_file(1)).rename(folder / layer_file(2))
    (folder / layer_file(1)).write_bytes((folder / layer_file(2)).read_bytes())
    return r"has too much: layer-00002\.safetensors"


def _masks(folder: Path) -> dict[str, Tensor]:
    model = transformers.AutoModelForCausalLM.from_config(CONFIG)
    names = load_file(folder / layer_file(1))
    return {name: torch.zeros(model.get_submodule(name).weight.shape).bool() for name in names}


@pytest.mark.parametrize(
    "spoil",
    [
        _spoil_shape,
        _spoil_turned,
        _spoil_names,
        _spoil_more,
        _spoil_bytes,
        _spoil_layers,
        _spoil_more_layers,
    ],
)
def test_masks_that_do_not_fit_the_model_are_refused(
    dense: Dense, tmp_path: Path, spoil: Any
) -> None:
    source = dense.model()
    spec = dense.spec(source, Magnitude(), sparsity=0.5)
    folder = dense.run(spec, {}, tmp_path)[spec.key] / "masks"
    words = spoil(folder)
    with pytest.raises(LayerFileError, match=words):
        apply_masks(load_model(source, {}), folder)
