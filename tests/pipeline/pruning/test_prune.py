"""The whole pruning of small models of real classes, randomly initialised."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from torch import Tensor, nn

from pipeline.errors import InputError, NonFiniteError
from pipeline.models.matrices import decoder_layers
from pipeline.pruning.allocation import LayerTarget, ModelTarget
from pipeline.pruning.outliers import count_outliers
from pipeline.pruning.prune import prune_model
from pipeline.pruning.pruners import rtn
from pipeline.pruning.pruners.grids import RoundingError, grid_of
from pipeline.pruning.sparsity_check import SparsityError, check_sparsity, count_zeros
from pipeline.pruning.walk import walk
from pipeline.pruning.window_groups import Memory
from pipeline.specs import (
    GPTQ,
    OWL,
    RTN,
    FirstLayers,
    Magnitude,
    Pattern,
    Pruner,
    SparseGPT,
    Uniform,
    Wanda,
)
from tests.pipeline.tiny_models import random_model, windows

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GATED = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}
CONFIGS = {
    "llama": transformers.LlamaConfig(**GATED),
    "mistral": transformers.MistralConfig(**GATED, sliding_window=8),
    "qwen2": transformers.Qwen2Config(**GATED),
    "gemma2": transformers.Gemma2Config(**GATED, head_dim=8, sliding_window=8),
    "gemma3": transformers.Gemma3TextConfig(**GATED, head_dim=8, sliding_window=8),
    "neox": transformers.GPTNeoXConfig(**SMALL, intermediate_size=64),
    "opt": transformers.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32),
    "phi3": transformers.Phi3Config(**GATED, pad_token_id=0),
    "olmo2": transformers.Olmo2Config(**GATED),
}
PRUNERS: list[Pruner] = [Magnitude(), Wanda(), SparseGPT()]


def model_of(name: str) -> Any:
    return random_model(CONFIGS[name])


def inner_linears(model: nn.Module) -> dict[str, nn.Linear]:
    root, layers = decoder_layers(model)
    return {
        f"{root}.{name}": module
        for name, module in layers.named_modules()
        if isinstance(module, nn.Linear)
    }


def pruned_model(
    name: str, pruner: Pruner, sparsity: float = 0.5, pattern: Pattern | None = None
) -> Any:
    model = model_of(name)
    data = windows() if pruner.calibrated else None
    prune_model(model, data, pruner, ModelTarget(LayerTarget(sparsity, pattern)))
    return model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda pruner: pruner.name)
def test_every_inner_matrix_is_pruned_and_all_else_is_untouched(name: str, pruner: Pruner) -> None:
    dense, pruned = model_of(name), pruned_model(name, pruner)
    linears = inner_linears(pruned)
    assert len(linears) >= 3 * 4
    for linear in linears.values():
        assert int((linear.weight == 0).sum()) == linear.weight.numel() // 2
    inside = {f"{matrix}.weight" for matrix in linears}
    for (key, before), (_, after) in zip(
        dense.named_parameters(), pruned.named_parameters(), strict=True
    ):
        assert torch.equal(before, after) == (key not in inside), key
    assert bool(pruned(input_ids=windows()).logits.isfinite().all())


def test_batches_of_any_size_give_the_same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pruned_model("llama", Wanda())
    monkeypatch.setattr(
        "pipeline.pruning.window_groups.BATCH_TOKENS", 3 * 24
    )  # batches of 3, 3, 3 and 1
    parts = pruned_model("llama", Wanda())
    for name, linear in inner_linears(whole).items():
        same = (linear.weight == 0) == (inner_linears(parts)[name].weight == 0)
        assert float(same.float().mean()) > 0.999


def test_wanda_on_a_whole_model_is_its_formula_on_the_first_layers_inputs() -> None:
    dense, pruned = model_of("llama"), pruned_model("llama", Wanda(), 0.6)
    inputs: list[Tensor] = []
    layer = dense.model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    dense(input_ids=windows())
    norms = np.linalg.norm(inputs[0].detach().double().numpy().reshape(-1, 32), axis=0)
    scores = np.abs(layer.weight.detach().double().numpy()) * norms
    mask = (pruned.model.layers[0].self_attn.q_proj.weight == 0).numpy()
    for row, row_mask in zip(scores, mask, strict=True):
        assert set(np.argsort(row)[: math.floor(0.6 * 32)]) == set(np.flatnonzero(row_mask))


@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda pruner: pruner.name)
@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(4, 8), Pattern(1, 4)])
def test_patterns_hold_in_every_group(pruner: Pruner, pattern: Pattern) -> None:
    kept, group = pattern
    model = pruned_model("llama", pruner, 1 - kept / group, pattern)
    for linear in inner_linears(model).values():
        nonzero = (linear.weight != 0).view(linear.out_features, -1, group).sum(dim=2)
        assert set(nonzero.flatten().tolist()) == {kept}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda pruner: pruner.name)
def test_half_precision_stays_and_zeros_are_exact(pruner: Pruner, dtype: torch.dtype) -> None:
    model = model_of("llama").to(dtype)
    prune_model(
        model, windows() if pruner.calibrated else None, pruner, ModelTarget(LayerTarget(0.5))
    )
    for linear in inner_linears(model).values():
        assert linear.weight.dtype == dtype
        assert int((linear.weight == 0).sum()) == linear.weight.numel() // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("share", "layers"), [(None, 3), (0.5, 2)])
@pytest.mark.parametrize("quantizer", [RTN(bits=3, group_size=16), GPTQ(bits=3, group_size=16)])
def test_every_matrix_of_the_layers_that_are_asked_for_is_rounded_though_none_is_pruned(
    quantizer: RTN | GPTQ, share: float | None, layers: int, dtype: torch.dtype
) -> None:
    dense, rounded = model_of("llama").to(dtype), model_of("llama").to(dtype)
    allocation = Uniform() if share is None else FirstLayers(share=share)
    data = windows() if quantizer.calibrated else None
    report = prune_model(rounded, data, quantizer, ModelTarget(LayerTarget(0.0), allocation))
    assert len(rounded.model.layers) == 3
    assert len(report.matrices) == len(inner_linears(rounded))
    before = inner_linears(dense)
    for name, linear in inner_linears(rounded).items():
        number = int(name.split(".")[2])
        assert torch.equal(linear.weight, before[name].weight) == (number >= layers)
        if number < layers:
            for part in linear.weight.split(16, dim=1):
                assert max(len(row.unique()) for row in part) <= 8


def test_more_values_than_bits_allow_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtn, "grid_of", lambda weight, options: grid_of(weight, RTN(bits=5)))
    with pytest.raises(RoundingError, match=r"layers\.0.* values in a group of 128, at most 16"):
        prune_model(model_of("llama"), None, RTN(bits=4), ModelTarget(LayerTarget(0.0)))


def test_the_same_windows_give_the_same_bytes() -> None:
    one, two = pruned_model("llama", SparseGPT()), pruned_model("llama", SparseGPT())
    for first, second in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(first, second)


def test_a_pruned_model_saved_and_loaded_gives_the_same_logits(tmp_path: Path) -> None:
    for name in ("llama", "opt", "gemma3"):
        model = pruned_model(name, SparseGPT())
        model.save_pretrained(tmp_path / name)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        data = windows()
        torch.testing.assert_close(again(input_ids=data).logits, model(input_ids=data).logits)
        for key, linear in inner_linears(model).items():
            assert torch.equal(inner_linears(again)[key].weight, linear.weight)


# ----------------------------------------------------------------------------------------- errors


def test_a_pattern_that_does_not_fit_names_the_matrix() -> None:
    with pytest.raises(InputError, match=r"'3:7'.*layers\.0.*32 inputs, no multiple of 7"):
        prune_model(
            model_of("llama"), None, Magnitude(), ModelTarget(LayerTarget(4 / 7, Pattern(3, 7)))
        )


def test_a_pattern_must_fit_the_inputs_of_a_matrix_and_not_its_outputs() -> None:
    config = transformers.LlamaConfig(**{**GATED, "intermediate_size": 60})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.down_proj has 60 inputs, no multiple"):
        prune_model(model, None, Magnitude(), ModelTarget(LayerTarget(0.5, Pattern(4, 8))))


def test_windows_that_are_too_long_for_the_model_are_refused() -> None:
    with pytest.raises(InputError, match="seqlen: 65: the model takes at most 64 tokens"):
        prune_model(model_of("llama"), windows(1, 65), Wanda(), ModelTarget(LayerTarget(0.5)))


def test_a_weight_that_is_not_finite_is_an_error_that_names_its_matrix() -> None:
    model = model_of("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj: the weight"):
        prune_model(model, None, Magnitude(), ModelTarget(LayerTarget(0.5)))


def test_an_activation_that_is_not_finite_is_an_error_that_names_its_matrix() -> None:
    model = model_of("llama")
    model.model.layers[1].input_layernorm.weight.data[3] = float("inf")
    with pytest.raises(NonFiniteError, match=r"layers\.1\.self_attn\.q_proj: its input"):
        prune_model(model, windows(), Wanda(), ModelTarget(LayerTarget(0.5)))


def test_a_wrong_count_of_zeros_is_an_error_that_names_the_matrix() -> None:
    def pruned(columns: slice) -> tuple[Tensor, Tensor]:
        mask = torch.zeros(4, 8, dtype=torch.bool)
        mask[:, columns] = True
        return torch.ones(4, 8).masked_fill_(mask, 0.0), mask

    weight, mask = pruned(slice(3))
    with pytest.raises(SparsityError, match="up_proj: 12 weights of a matrix are pruned, not 16"):
        check_sparsity("up_proj", weight, mask, LayerTarget(0.5), "matrix")
    with pytest.raises(SparsityError, match="up_proj: 3 weights of a row are pruned, not 4"):
        check_sparsity("up_proj", weight, mask, LayerTarget(0.5), "row")
    check_sparsity("up_proj", weight, mask, LayerTarget(0.375), "matrix")
    weight[:, 3:5] = 0  # as the dense matrix was there, or half precision rounds
    check_sparsity("up_proj", weight, mask, LayerTarget(0.375), "row")
    with pytest.raises(SparsityError, match="3 weights of a group of 4 are pruned, not 2"):
        check_sparsity("up_proj", weight, mask, LayerTarget(0.5, Pattern(2, 4)), "row")
    weight, mask = pruned(slice(0, 8, 2))
    check_sparsity("up_proj", weight, mask, LayerTarget(0.5, Pattern(2, 4)), "row")
    weight[1, 2] = 1
    with pytest.raises(SparsityError, match="up_proj: 1 pruned weights are not zero"):
        check_sparsity("up_proj", weight, mask, LayerTarget(0.5, Pattern(2, 4)), "row")


# ------------------------------------------------------------------------------------------ stage


def test_the_stage_leaves_a_checkpoint_and_the_sparsity_of_each_matrix(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    from pipeline.pruning.prune import run
    from pipeline.specs import FileCorpus, LocalModel, PruneSpec, WindowsSpec

    dense = tmp_path / "dense"
    model_of("llama").save_pretrained(dense)
    vocabulary = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary).save_pretrained(dense)
    source = LocalModel(path=str(dense), dtype="float32")
    calibration = WindowsSpec(source=FileCorpus(path="unread"), model=source)
    data = tmp_path / "windows"
    data.mkdir()
    pq.write_table(_table(windows()), data / "windows.parquet")
    spec = PruneSpec(model=source, pruner=SparseGPT(), sparsity=0.5, calibration=calibration)
    output = tmp_path / "output"
    output.mkdir()
    report = run(spec, {calibration.key: data}, output)
    rows = pq.read_table(output / "sparsity.parquet").to_pylist()
    assert report["sparsity"] == 0.5
    assert report["matrices"] == len(rows) == 3 * 7
    assert {row["sparsity"] for row in rows} == {0.5}
    assert report["raised_damping"] == {}
    assert "starved_experts" not in report  # it has no experts
    again = transformers.AutoModelForCausalLM.from_pretrained(output / "model").eval()
    direct = pruned_model("llama", SparseGPT())
    for key, linear in inner_linears(direct).items():
        assert torch.equal(inner_linears(again)[key].weight, linear.weight)
    assert len(transformers.AutoTokenizer.from_pretrained(output / "model")) == 2


@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda pruner: pruner.name)
def test_the_first_layers_alone_are_pruned_as_in_the_whole_model(pruner: Pruner) -> None:
    data = windows() if pruner.calibrated else None
    dense, whole, model = model_of("llama"), pruned_model("llama", pruner), model_of("llama")
    runs = []
    model.model.layers[2].mlp.register_forward_pre_hook(lambda module, given: runs.append(module))
    report = prune_model(model, data, pruner, ModelTarget(LayerTarget(0.5), FirstLayers(share=0.4)))
    assert not runs  # 0.4 of three layers are two
    for name, linear in inner_linears(model).items():
        same = dense if name.startswith("model.layers.2.") else whole
        assert torch.equal(linear.weight, inner_linears(same)[name].weight), name
    assert report.sparsity == pytest.approx(0.5 * 2 / 3)
    assert len(report.matrices) == 3 * 7


def test_masks_of_the_first_layers_make_the_same_model_when_they_are_loaded(tmp_path: Path) -> None:
    from pipeline.models.loading import load_model
    from pipeline.pruning.prune import run
    from pipeline.specs import LocalModel, PruneSpec

    model_of("llama").save_pretrained(tmp_path / "dense")
    source = LocalModel(path=str(tmp_path / "dense"), dtype="float32")
    spec = PruneSpec(
        model=source, pruner=Magnitude(), sparsity=0.5, allocation=FirstLayers(share=0.5)
    )
    (tmp_path / "output").mkdir()
    report = run(spec, {}, tmp_path / "output")
    assert report["sparsity"] == pytest.approx(1 / 3)
    loaded = load_model(spec, {spec.key: tmp_path / "output"})
    direct = model_of("llama")
    prune_model(direct, None, Magnitude(), ModelTarget(LayerTarget(0.5), FirstLayers(share=0.5)))
    for key, linear in inner_linears(direct).items():
        assert torch.equal(inner_linears(loaded)[key].weight, linear.weight)


def _table(data: Tensor) -> Any:
    import pyarrow as pa

    return pa.table({"token_ids": pa.array(data.tolist(), pa.list_(pa.int32()))})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_zeros_of_either_sign_are_counted_and_the_smallest_values_are_none(
    dtype: torch.dtype,
) -> None:
    smallest = torch.finfo(dtype).smallest_normal
    values = [0.0, -0.0, smallest, -smallest, 1.0, float("inf"), float("nan"), 0.0]
    assert count_zeros("m", torch.tensor([values], dtype=dtype).view(2, 4).T).zeros == 3


# ---------------------------------------------------------------------------------- called by hand

NAN = float("nan")


@pytest.mark.parametrize(
    ("sparsity", "pattern", "message"),
    [
        (0.9, Pattern(2, 4), r"sparsity: 0\.9: contradicts pattern 2:4, which is sparsity 0\.5"),
        (0.0, Pattern(2, 4), "contradicts pattern 2:4"),
        (1.5, None, r"sparsity: 1\.5: is no share"),
        (1.0, None, r"sparsity: 1\.0: is no share"),
        (-0.1, None, r"sparsity: -0\.1: is no share"),
        (NAN, None, "sparsity: nan: is no share"),
        (NAN, Pattern(2, 4), "sparsity: nan: is no share"),
        (0.5, Pattern(4, 2), "pattern: '4:2': must keep"),
        (0.5, Pattern(0, 4), "pattern: '0:4': must keep"),
    ],
)
def test_a_wrong_target_cannot_be_made(
    sparsity: float, pattern: Pattern | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        LayerTarget(sparsity, pattern)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(8, dtype=torch.int64), r"windows: \[8\]: must be token ids"),
        (torch.zeros(1, 4, 8, dtype=torch.int64), r"windows: \[1, 4, 8\]: must be token ids"),
        (torch.zeros(0, 8, dtype=torch.int64), r"windows: \[0, 8\]: must be token ids"),
        (torch.zeros(2, 0, dtype=torch.int64), r"windows: \[2, 0\]: must be token ids"),
        (torch.rand(2, 8), r"windows: 'torch\.float32': must be token ids"),
        (torch.arange(89, 97)[None], "token id: 96: has no embedding: the model has 96"),
        (torch.arange(-1, 7)[None], "token id: -1: has no embedding"),
        (torch.zeros(2, 65, dtype=torch.int64), "seqlen: 65: the model takes at most 64 tokens"),
    ],
)
def test_windows_that_do_not_suit_the_model_are_an_error(data: Tensor, message: str) -> None:
    for gather in (
        lambda model: prune_model(model, data, Wanda(), ModelTarget(LayerTarget(0.5))),
        lambda model: count_outliers(model, data, 5.0),
        lambda model: walk(model, data, ("hessian",), lambda number, found: None),
    ):
        with pytest.raises(InputError, match=message):
            gather(model_of("llama"))


def test_a_model_in_training_mode_is_an_error_even_if_only_a_part_of_it_is() -> None:
    model = model_of("llama")
    model.model.layers[2].self_attn.train()
    with pytest.raises(InputError, match=r"LlamaForCausalLM.*training mode.*call model\.eval\(\)"):
        prune_model(model, windows(), Wanda(), ModelTarget(LayerTarget(0.5)))


def test_impossible_numbers_are_errors() -> None:
    model = model_of("llama")
    with pytest.raises(InputError, match="batch_size: 0: take at least one window"):
        prune_model(
            model, windows(), Wanda(), ModelTarget(LayerTarget(0.5)), memory=Memory(batch_size=0)
        )
    for threshold in (0.0, -5.0, NAN, math.inf):
        with pytest.raises(InputError, match=r"threshold: .*must be a finite number above 0"):
            count_outliers(model, windows(), threshold)
    with pytest.raises(InputError, match=r"outlier_ratios: .*no shares"):
        prune_model(
            model, windows(), Wanda(), ModelTarget(LayerTarget(0.5), OWL(), [0.1, NAN, 0.2])
        )
