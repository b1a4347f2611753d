"""What stages take of memory, by hand on small shapes, and what a plan says of large ones."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.graph import Resources
from cluster.session import ResourceError
from cluster.store import Store
from jobs.check import GPU_BYTES, _check_memory, check_room
from jobs.cost import ModelSize, model_size
from jobs.footprint import (
    LIBRARY_BYTES,
    exchanged_bytes,
    footprint,
    llama_shape,
    pretrained_shape,
    shape_of,
)
from jobs.grid import Grid
from jobs.plan import Plan, footprints, make_plan, print_plan
from jobs.sizes import tensor_shapes
from pipeline.errors import InputError
from pipeline.specs import (
    DescribeSpec,
    EvaluateSpec,
    GenerateSpec,
    HubCorpus,
    HubModel,
    LocalModel,
    Magnitude,
    PerplexitySpec,
    PretrainSpec,
    PruneSpec,
    ShardSpec,
    SparseGPT,
    Vllm,
    Wanda,
    WindowsSpec,
)

Content = dict[str, Any]
Load = Callable[[Content], Grid]

CORPUS = HubCorpus(path="c")
MODEL = HubModel(name="m", dtype="bfloat16")
SMALL = llama_shape(3, hidden=32, mlp=48, key_width=16, vocabulary=96, tied=False)
LAYER = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32
LLAMA_70B = (80, 8192, 28_672, 1024, 32_000)
GPU = Resources(gpus=1)


def calibration(nsamples: int = 128, seqlen: int = 2048) -> WindowsSpec:
    return WindowsSpec(source=CORPUS, model=MODEL, nsamples=nsamples, seqlen=seqlen)


def pruning(pruner: Any, nsamples: int = 128, seqlen: int = 2048) -> PruneSpec:
    windows = calibration(nsamples, seqlen)
    return PruneSpec(model=MODEL, pruner=pruner, sparsity=0.5, calibration=windows)


# ----------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied-head"])
def test_headers_configurations_and_closed_forms_give_one_shape(tied: bool, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    config.save_pretrained(tmp_path / "config")
    LlamaForCausalLM(config).save_pretrained(tmp_path / "whole")
    expected = llama_shape(3, 32, 48, 16, 96, tied=tied)
    assert expected.layer_weights == LAYER
    assert expected.outside_weights == (1 if tied else 2) * 96 * 32 + 32
    assert expected.weights == 3 * LAYER + expected.outside_weights
    for name in ("config", "whole"):
        found = shape_of(tensor_shapes(LocalModel(path=str(tmp_path / name))) or {})
        assert found is not None
        assert sorted(found.inputs.values()) == [32, 32, 32, 48]
        assert found.weights == expected.weights
        assert found.layer_weights == expected.layer_weights
        assert (found.layers, found.vocabulary, found.hidden) == (3, 96, 32)
        assert found.size == ModelSize(expected.weights, 3 * LAYER, 96 * 32)


def test_experts_are_matrices_one_by_one_in_a_tensor_or_in_several() -> None:
    outside = {"embed.weight": (96, 32)}
    fused = shape_of({**outside, "layers.0.experts.up": (4, 48, 32)})
    apart = shape_of({**outside, **{f"layers.0.experts.{n}.up.weight": (48, 32) for n in range(4)}})
    assert fused is not None
    assert apart is not None
    for each in (fused, apart):
        assert [(matrix.rows, matrix.columns) for matrix in each.matrices] == [(48, 32)] * 4
        assert len(each.inputs) == 4


def test_names_without_numbered_layers_have_no_shape() -> None:
    assert shape_of({"embed.weight": (96, 32)}) is None
    assert shape_of({}) is None


# ------------------------------------------------------------------------------------------- bytes


def test_a_pruning_holds_one_layer_its_statistics_and_the_hidden_states_of_all_windows() -> None:
    for pruner, statistics in (
        (Wanda(), 4 * (3 * 32 + 48)),
        (SparseGPT(), 4 * (3 * 32**2 + 48**2)),
    ):
        found = footprint(pruning(pruner), SMALL, GPU, 80e9)
        assert found is not None
        assert found.streamed
        assert found.device["decoder layers"] == 2 * LAYER
        assert found.device["outside the layers"] == 2 * (2 * 96 * 32 + 32)
        assert found.device["statistics"] == statistics
        assert found.device["hidden states"] == 128 * 2048 * 32 * 2
        assert found.host["libraries"] == LIBRARY_BYTES
        assert found.host["decoder layers, read ahead"] == 2 * 2 * LAYER
        on_cpu = footprint(pruning(pruner), SMALL, Resources(), 80e9)
        assert on_cpu is not None
        assert on_cpu.host["decoder layers"] == 2 * 2 * LAYER


def test_hidden_states_wait_where_the_budgets_have_room() -> None:
    states = 128 * 2048 * 32 * 2
    budgets = {"device_hidden_bytes": 1000, "host_hidden_bytes": 5000}
    on_gpu = footprint(pruning(Wanda()), SMALL, GPU, 80e9, budgets)
    on_cpu = footprint(pruning(Wanda()), SMALL, Resources(), 1e9, budgets)
    assert on_gpu is not None
    assert on_cpu is not None
    assert on_gpu.device["hidden states"] == 1000
    assert on_gpu.host["hidden states"] == 5000
    assert on_cpu.host["hidden states"] == 6000
    assert not on_cpu.device
    assert on_gpu.disk["hidden states"] == on_cpu.disk["hidden states"] == states - 6000


def test_a_pruning_without_data_has_neither_statistics_nor_hidden_states() -> None:
    found = footprint(PruneSpec(model=MODEL, pruner=Magnitude(), sparsity=0.5), SMALL, GPU, None)
    assert found is not None
    assert not {"statistics", "hidden states"} & found.device.keys()
    assert found.disk == {"artifact": SMALL.weights / 8}


def test_a_perplexity_holds_two_layers_or_the_whole_model_and_both_models_for_kl() -> None:
    entry = PerplexitySpec(name="p", corpus=CORPUS, seqlen=64, max_windows=10)
    alone = EvaluateSpec(model=MODEL, perplexity=(entry,))
    both = EvaluateSpec(model=pruning(Wanda()), perplexity=(entry.model_copy(update={"kl": True}),))
    for spec, models in ((alone, 1), (both, 2)):
        least = models * 2 * SMALL.weights / 0.8
        whole = footprint(spec, SMALL, Resources(), math.ceil(least))
        streamed = footprint(spec, SMALL, Resources(), math.floor(least) - 1)
        assert whole is not None
        assert streamed is not None
        assert (whole.streamed, streamed.streamed) == (False, True)
        assert whole.weights == models * 2 * SMALL.weights
        assert streamed.host["decoder layers"] == 2 * 2 * LAYER
        assert streamed.host["hidden states"] == models * 10 * 64 * 32 * 2
        budgets = {"device_hidden_bytes": 1000, "host_hidden_bytes": 5000}
        in_parts = footprint(spec, SMALL, Resources(), 1, budgets)
        assert in_parts is not None
        assert in_parts.host["hidden states"] == models * 6000
        assert not in_parts.disk


def test_an_engine_spreads_a_model_over_its_gpus() -> None:
    spec = GenerateSpec(
        model=MODEL,
        num_samples=8,
        seqlen=64,
        backend=Vllm(tensor_parallel_size=4),
        prefixes=CORPUS,
    )
    shard = ShardSpec(of=spec, index=0)
    found = footprint(shard, SMALL, Resources(gpus=4), 80e9)
    assert footprint(spec, SMALL, Resources(), None) is None  # it joins the shards
    assert found is not None
    assert found.device["weights"] == 2 * SMALL.weights / 4


def test_actors_receive_the_statistics_of_their_matrices_and_the_others_masks() -> None:
    wanda, sparsegpt = pruning(Wanda()), pruning(SparseGPT())
    assert exchanged_bytes(wanda, SMALL, 1) == (0, 0)
    # Seven matrices, each with an actor of its own; an eighth prunes none. For each matrix six
    # sums are received to be added, on two levels, and two by the actor that prunes it.
    everything = sum(matrix.weights for matrix in SMALL.matrices)
    widths = [32] * 6 + [48]
    most, masks = exchanged_bytes(wanda, SMALL, 8)
    assert masks == 3 * (8 * 4 * sum(widths) + 7 * everything / 8)
    assert most == 3 * (2 * 4 * sum(widths) + 2 * 4 * 48 + everything / 8)
    _, weights = exchanged_bytes(sparsegpt, SMALL, 8)
    assert weights == 3 * (8 * 4 * sum(width**2 for width in widths) + 7 * everything * 2)


# ------------------------------------------------------------------------------------------- plans


def sparse_checkpoint(
    folder: Path, layers: int, hidden: int, mlp: int, keys: int, vocab: int
) -> None:
    """Write a checkpoint whose header is that of a Llama and whose data are a hole."""
    layer = {
        **{f"self_attn.{name}_proj": (hidden, hidden) for name in "qo"},
        **{f"self_attn.{name}_proj": (keys, hidden) for name in "kv"},
        **{f"mlp.{name}_proj": (mlp, hidden) for name in ("gate", "up")},
        "mlp.down_proj": (hidden, mlp),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    tensors: dict[str, tuple[int, ...]] = {
        f"model.layers.{number}.{name}.weight": shape
        for number in range(layers)
        for name, shape in layer.items()
    }
    tensors |= {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    tensors["model.norm.weight"] = (hidden,)
    header, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


@pytest.fixture(scope="module")
def llama_70b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama-70b"
    sparse_checkpoint(folder, *LLAMA_70B)
    return folder


@pytest.fixture
def planned(llama_70b: Path, content: Content, load: Load) -> Plan:
    content["models"] = {"large": {"kind": "local-model", "path": str(llama_70b)}}
    content["models"]["large"]["dtype"] = "bfloat16"
    content["calibrations"] = {"notes": {"corpus": "notes"}}
    content["cells"] |= {
        "model": "large",
        "calibration": "notes",
        "pruner": ["wanda", "sparsegpt"],
        "nsamples": 128,
        "seqlen": 2048,
    }
    content["evaluate"] = {"perplexity": [{"corpus": "notes", "seqlen": 2048}]}
    content["resources"] = {name: {"gpus": 1} for name in ("prune", "evaluate")}
    return make_plan(load(content))


def node(gpu: str | None = "H100", memory: float = 200e9) -> dict[str, float]:
    typed = {} if gpu is None else {f"accelerator_type:{gpu}": 1.0}
    return {"CPU": 16, "GPU": 1, "memory": memory, "object_store_memory": 60e9, **typed}


def test_a_grid_of_llama_2_70b_is_planned_for_one_gpu_of_80_gigabytes(
    planned: Plan, llama_70b: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert GPU_BYTES["H100"] == 80e9
    check_room(planned, planned.specs, [node()], may_grow=False)
    assert list(_check_memory(planned)) == []
    assert not caplog.records
    found = footprints(planned, planned.specs, 80e9, 260e9)
    assert {kind for kind, _ in found} == {"prune", "evaluate"}
    for each in found.values():
        assert each.streamed
        assert each.peaks[0] < 80e9
        # a layer of 70B has 1.7 GB; SparseGPT a Hessian of 28,672 x 28,672 and its factors
        assert each.device["decoder layers"] == pytest.approx(1.71e9, rel=0.01)
    console = Console(record=True, width=140)
    print_plan(planned, Store(str(tmp_path)), console)
    printed = console.export_text()
    assert "largest peak of a stage" in printed
    assert any("prune" in line and "by layer" in line for line in printed.splitlines())


def test_a_run_refuses_what_cannot_fit_and_warns_of_what_may_not(
    planned: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    check_room(planned, planned.specs, [node(None)], may_grow=False)
    assert "the GPUs' type and memory are unknown" in caplog.text
    caplog.clear()
    check_room(planned, planned.specs, [node("T4")], may_grow=False)  # 27 GB of 16, by estimate
    assert "and the largest has 16.00 GB: take a larger one" in caplog.text


def test_a_model_that_is_loaded_whole_is_refused_where_it_is_larger_than_a_node(
    planned: Plan, content: Content, load: Load
) -> None:
    content["calibrations"] = {"own": {"prefixes": "notes", "num_samples": 8}}
    content["cells"] |= {"calibration": "own", "pruner": "wanda", "nsamples": 2, "seed": 0}
    content["resources"] = {}
    plan = make_plan(load(content))
    with pytest.raises(
        ResourceError, match=r"resources\.generate: .*largest has 40\.00 GB: take bac"
    ):
        check_room(plan, plan.specs, [{"memory": 40e9}], may_grow=False)
    check_room(plan, plan.specs, [{"memory": 40e9}], may_grow=True)
    check_room(plan, plan.specs, [{"memory": 400e9}], may_grow=False)


def test_less_reserved_memory_than_weights_is_a_mistake_and_less_than_the_peak_a_warning(
    planned: Plan, content: Content, load: Load
) -> None:
    content["resources"] = {"prune": {"memory_bytes": 10**9}}
    with pytest.raises(InputError, match=r"resources.prune.memory_bytes: 1000000000: .* raise it"):
        list(_check_memory(make_plan(load(content))))
    content["resources"] = {"prune": {"memory_bytes": 8 * 10**9}}
    (note,) = _check_memory(make_plan(load(content)))
    assert note.startswith("resources.prune.memory_bytes: 8000000000: ")
    content["resources"] = {"prune": {"memory_bytes": 80 * 10**9}}
    assert list(_check_memory(make_plan(load(content)))) == []


def test_the_testbeds_models_have_the_parameters_that_their_spec_gives(
    content: Content, load: Load
) -> None:
    spec = load(content).models["testbed"]
    assert isinstance(spec, PretrainSpec)
    norms = (2 * spec.num_layers + 1) * spec.hidden_size
    size = model_size(spec, {})
    assert size is not None
    assert pretrained_shape(spec).weights == size.whole + norms
    assert pretrained_shape(spec).size.output == size.output


def test_a_description_is_read_like_the_texts_of_a_perplexity() -> None:
    found = footprint(
        DescribeSpec(model=MODEL, calibration=calibration(4, 64)), SMALL, Resources(), 1.0
    )
    assert found is not None
    assert found.host["hidden states"] == 4 * 64 * 32 * 2
