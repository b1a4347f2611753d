"""The walk through small models of real classes, randomly initialised."""

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from pipeline.errors import InputError, NonFiniteError
from pipeline.models.matrices import Matrix, decoder_layers
from pipeline.progress import reporting
from pipeline.pruning.walk import layer_sizes, walk
from pipeline.pruning.window_groups import Memory
from tests.pipeline.tiny_models import random_model, windows

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
GATED = {
    **SMALL,
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**GATED),
    "mixtral": transformers.MixtralConfig(**GATED, num_local_experts=4, num_experts_per_tok=2),
    # embeddings of each layer and keys and values of earlier layers are passed to the layers
    "gemma4": transformers.Gemma4TextConfig(
        **GATED,
        head_dim=8,
        global_head_dim=8,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "opt": transformers.OPTConfig(
        **SMALL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64
    ),
    "falcon": transformers.FalconConfig(**SMALL),  # its layers return tuples
}


def test_matrices_that_read_the_same_tensor_share_their_statistics() -> None:
    def visit(number: int, found: list[Matrix]) -> None:
        shared: dict[int, set[str]] = {}
        for matrix in found:
            identity = id(matrix.statistics["hessian"])
            shared.setdefault(identity, set()).add(matrix.name.rsplit(".", 1)[1])
        assert sorted(map(sorted, shared.values())) == [
            ["down_proj"],
            ["gate_proj", "up_proj"],
            ["k_proj", "q_proj", "v_proj"],
            ["o_proj"],
        ]

    walk(random_model(CONFIGS["llama"]), windows(), ("hessian",), visit, Memory(batch_size=4))


@pytest.mark.parametrize("batch_size", [None, 3, 10, 99])
def test_statistics_do_not_depend_on_the_batch_size(batch_size: int | None) -> None:
    def norms(size: int | None) -> list[Tensor]:
        totals: list[Tensor] = []

        def visit(number: int, found: list[Matrix]) -> None:
            totals.extend(matrix.statistics["squared_norms"] for matrix in found)

        walk(
            random_model(CONFIGS["llama"]),
            windows(),
            ("squared_norms",),
            visit,
            Memory(batch_size=size),
        )
        return totals

    for found, expected in zip(norms(batch_size), norms(1), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch_tokens", [23, 24, 48])
def test_windows_go_through_one_by_one_if_a_batch_is_shorter_than_two(
    batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.pruning.window_groups.BATCH_TOKENS", batch_tokens)
    model, sizes = random_model(CONFIGS["llama"]), set()
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, given: sizes.add(len(given[0])))
    walk(model, windows(), ("squared_norms",), lambda number, found: None)
    assert sizes == {2 if batch_tokens == 48 else 1}


def test_progress_rises_evenly_and_visits_begin_at_a_third_of_their_layer() -> None:
    done: list[float] = []
    visits: list[float] = []

    def note(phase: str, amount: float, total: float, unit: str) -> None:
        if unit == "layers":
            done.append(amount)
            assert total == 4

    with reporting(note):
        model, memory = random_model(CONFIGS["llama"]), Memory(batch_size=5)
        walk(model, windows(), ("squared_norms",), lambda *_: visits.append(done[-1]), memory)
    assert visits == pytest.approx([number + 1 / 3 for number in range(4)])
    sixths = [0, 1, 2, 5, 6]  # two batches for the statistics, and two with the layer pruned
    wanted = [number + sixth / 6 for number in range(4) for sixth in sixths]
    assert done == pytest.approx(wanted[:-2])


@pytest.mark.parametrize(("data", "asked"), [(None, ("hessian",)), (windows(), ())])
def test_without_data_or_statistics_the_model_is_never_run(
    data: Tensor | None, asked: tuple[str, ...]
) -> None:
    model, runs, visited = random_model(CONFIGS["opt"]), [], []
    model.register_forward_pre_hook(lambda module, given: runs.append(given))
    walk(model, data, asked, lambda number, found: visited.append((number, len(found))))
    assert visited == [(number, 6) for number in range(4)]
    assert not runs


def test_no_layer_is_run_more_often_than_it_must_be() -> None:
    """Once for its statistics and once to pass on what it gives pruned, but for the last layer."""
    model = random_model(CONFIGS["llama"])
    runs = [0] * 4

    def count(number: int) -> Any:
        def hook(module: nn.Module, given: Any) -> None:
            runs[number] += 1

        return hook

    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(count(number))
    walk(model, windows(), ("squared_norms",), lambda number, found: None, Memory(batch_size=4))
    assert runs == [3 + 3, 3 + 3, 3 + 3, 3]


def test_no_logits_are_computed_but_of_one_window_that_tries_how_layers_are_called() -> None:
    model, sizes = random_model(CONFIGS["llama"]), set()
    model.lm_head.register_forward_pre_hook(lambda _, given: sizes.add(len(given[0])))
    walk(model, windows(), ("squared_norms",), lambda number, found: None, Memory(batch_size=5))
    assert sizes == {1}


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_called_as_before_after_the_walk_even_when_it_fails(fails: bool) -> None:
    def visit(number: int, found: list[Matrix]) -> None:
        if fails:
            raise RuntimeError("stop here")

    model = random_model(CONFIGS["mixtral"])
    expected = model(input_ids=windows(2)).logits
    with pytest.raises(RuntimeError, match="stop here") if fails else nullcontext():
        walk(model, windows(), ("hessian",), visit)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.config._experts_implementation == "grouped_mm"
    assert torch.equal(model(input_ids=windows(2)).logits, expected)


# ---------------------------------------------------------------------------------- where it lives


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("CALPRUNE_SCRATCH", raising=False)
    return tmp_path


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


BATCH_BYTES = 2 * 24 * 32 * 4
"""Two windows' hidden states in float32."""


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("on_device", "on_host"), [(BATCH_BYTES, 2 * BATCH_BYTES), (0, 10**9), (0, 0)]
)
def test_statistics_are_the_same_bits_wherever_hidden_states_live(
    name: str, on_device: int, on_host: int, folder: Path
) -> None:
    def totals(**budgets: int) -> list[Tensor]:
        found_totals: list[Tensor] = []

        def visit(number: int, found: list[Matrix]) -> None:
            if budgets and name != "gemma4":  # that one keeps more than hidden states
                count = 0 if on_host > 10**6 else 5 - (on_device + on_host) // BATCH_BYTES
                assert [path.stat().st_size for path in files(folder)] == [BATCH_BYTES] * count
            for matrix in found:
                found_totals.extend(total.clone() for total in matrix.statistics.values())
                matrix.weight[:, ::2] = 0.0

        asked = ("squared_norms", "hessian")
        walk(random_model(CONFIGS[name]), windows(), asked, visit, Memory(batch_size=2, **budgets))
        return found_totals

    expected = totals()
    found = totals(device_hidden_bytes=on_device, host_hidden_bytes=on_host)
    assert len(found) == len(expected) > 4 * 4
    assert all(map(torch.equal, found, expected))
    assert not list(folder.iterdir())


def test_the_files_are_gone_even_if_pruning_fails(folder: Path) -> None:
    def fail(number: int, found: list[Matrix]) -> None:
        assert len(files(folder)) == 5
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        walk(
            random_model(CONFIGS["llama"]),
            windows(),
            ("hessian",),
            fail,
            Memory(device_hidden_bytes=0, host_hidden_bytes=0, batch_size=2),
        )
    assert not list(folder.iterdir())


def test_hidden_states_of_all_layers_lie_in_the_same_place() -> None:
    model = random_model(CONFIGS["llama"])
    places: list[set[int]] = [set() for _ in range(4)]
    for number, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_pre_hook(
            lambda module, given, number=number: places[number].add(given[0].data_ptr())
        )
    walk(model, windows(), ("squared_norms",), lambda number, found: None, Memory(batch_size=2))
    assert len(places[0]) == 5
    assert places.count(places[0]) == 4


@pytest.mark.parametrize("asked", [(), ("squared_norms",)])
def test_one_layer_at_a_time_is_moved_to_the_device_and_back(
    asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU that goes by another name, so that every layer seems to be elsewhere."""
    model, moves = random_model(CONFIGS["llama"]), []
    numbers = {layer: number for number, layer in enumerate(model.model.layers)}
    monkeypatch.setattr(
        nn.Module, "to", lambda module, device: moves.append((numbers[module], str(device)))
    )

    def visit(number: int, found: list[Matrix]) -> None:
        moves.append((number, "visited"))

    walk(model, windows(), asked, visit, Memory(device=torch.device("cpu", 0)))
    turns = ["cpu:0", "visited", "cpu"]
    assert moves == [(number, turn) for number in range(4) for turn in turns]


class Passing(nn.Module):
    """A layer that gives its hidden states first in a collection, and more for the next layer."""

    def __init__(self, kind: type, outputs: int) -> None:
        super().__init__()
        self.kind, self.outputs = kind, outputs
        self.linear = nn.Linear(8, 8)

    def forward(self, states: Tensor, *others: Tensor) -> Any:
        states = states + self.linear(sum(others, start=states))
        return self.kind([states, *(states * place for place in range(1, self.outputs))])


class Strict(nn.Module):
    """A decoder that takes only what its own layers give."""

    def __init__(self, kind: type, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = kind, outputs
        self.embedding = nn.Embedding(96, 8)
        self.layers = nn.ModuleList(Passing(kind, outputs) for _ in range(3))

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        states, others = self.embedding(input_ids), []
        for layer in self.layers:
            given = layer(states, *others)
            if (type(given), len(given)) != self.form:
                raise TypeError("no output of my layers")
            states, *others = given
        return states


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_layers_may_give_their_hidden_states_first_in_a_collection_and_pass_on_the_rest(
    kind: type, outputs: int
) -> None:
    model = Strict(kind, outputs).eval()
    totals: list[Tensor] = []

    def visit(number: int, found: list[Matrix]) -> None:
        totals.append(found[0].statistics["squared_norms"])

    walk(model, windows(), ("squared_norms",), visit, Memory(batch_size=4))
    inputs: list[Tensor] = []
    for layer in model.layers:
        layer.linear.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach()))
    model(windows(), use_cache=False)
    for found, whole in zip(totals, inputs, strict=True):
        torch.testing.assert_close(found, whole.flatten(0, 1).square().sum(dim=0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("budgets", [{}, {"device_hidden_bytes": 0}])
def test_a_model_in_host_memory_is_walked_on_the_gpu(name: str, budgets: dict[str, int]) -> None:
    def totals(model: Any, device: torch.device | None, **budgets: int) -> list[Tensor]:
        found_totals: list[Tensor] = []

        def visit(number: int, found: list[Matrix]) -> None:
            for other, layer in enumerate(decoder_layers(model)[1]):
                on_gpu = device is not None and other == number
                assert all(each.is_cuda == on_gpu for each in layer.parameters())
            for matrix in found:
                found_totals.append(matrix.statistics["squared_norms"].cpu())
                matrix.weight[:, ::2] = 0.0

        walk(
            model,
            windows(),
            ("squared_norms",),
            visit,
            Memory(device=device, batch_size=2, **budgets),
        )
        return found_totals

    model, other = random_model(CONFIGS[name]), random_model(CONFIGS[name])
    found = totals(model, torch.device("cuda"), **budgets)
    torch.testing.assert_close(found, totals(other, None), rtol=1e-3, atol=1e-5)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


# --------------------------------------------------------------------------------------- refusals


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, states: Tensor, extra: Tensor | None = None) -> Tensor:
        return states + self.linear(states)


class Decoder(nn.Module):
    """The simplest decoder, and what real ones may do between their layers."""

    def __init__(self, between: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.between = between
        self.embedding = nn.Embedding(96, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        states = self.embedding(input_ids)
        for layer in self.layers:
            match self.between:
                case "scales":
                    states = layer(states * 2)
                case "passes on":
                    states = layer(states, extra=states.mean(-1))
                case _:
                    states = layer(states)
        return states


def look(number: int, found: list[Matrix]) -> None:
    """Visit without doing anything."""


def test_a_model_with_code_of_its_own_is_walked_too() -> None:
    totals: list[Tensor] = []
    model, data = Decoder().eval(), windows()
    walk(model, data, ("hessian",), lambda _, found: totals.append(found[0].statistics["hessian"]))
    states = model.embedding(data).detach()
    for layer, total in zip(model.layers, totals, strict=True):
        tokens = states.flatten(0, 1).double()
        torch.testing.assert_close(total.double(), tokens.T @ tokens, rtol=1e-4, atol=1e-4)
        states = layer(states).detach()


@pytest.mark.parametrize(
    ("between", "message"),
    [("scales", "changes the hidden states between"), ("passes on", "depends on those below")],
)
def test_a_model_that_links_its_layers_otherwise_is_refused(between: str, message: str) -> None:
    with pytest.raises(InputError, match=f"Decoder.*{message}"):
        walk(Decoder(between).eval(), windows(), ("hessian",), look)


class Experts(nn.Module):
    """All experts at once, which no product with one of them shows."""

    is_transposed = False

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, states: Tensor) -> Tensor:
        return torch.einsum("eij,btj->bti", self.up_proj, states)


def test_experts_whose_inputs_cannot_be_observed_are_refused_by_name() -> None:
    model = Decoder().eval()
    model.layers[1].linear = nn.Sequential(nn.Linear(8, 8), Experts())
    model.eval()
    with pytest.raises(InputError, match=r"layers\.1\.linear\.1\.up_proj\.0.*cannot be observed"):
        walk(model, windows(), ("hessian",), look)


def test_weights_that_two_layers_share_are_refused_by_name() -> None:
    model = random_model(CONFIGS["llama"])
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    message = r"model\.layers\.1\.mlp\.up_proj\.weight.*belongs to decoder layers 0 and 1"
    with pytest.raises(InputError, match=message):
        walk(model, windows(), ("hessian",), look)
    with pytest.raises(InputError, match=message):
        layer_sizes(model)


def test_layers_that_are_called_again_after_the_last_are_refused() -> None:
    """The layers of a model that loops."""
    model = random_model(CONFIGS["llama"])
    once = model.model.forward

    def twice(**arguments: Any) -> Any:
        once(**arguments)
        return once(**arguments)

    model.model.forward = twice
    with pytest.raises(InputError, match=r"LlamaForCausalLM.*once each"):
        walk(model, windows(), ("hessian",), look)


def test_an_unused_matrix_is_refused_by_name() -> None:
    model = random_model(CONFIGS["llama"])
    model.model.layers[1].spare = nn.Linear(32, 32)
    model.eval()
    with pytest.raises(InputError, match=r"layers\.1\.spare.*takes no part"):
        walk(model, windows(), ("hessian",), look)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("asked", ["squared_norms", "hessian"])
def test_an_activation_that_is_not_finite_is_an_error_that_names_its_matrix(
    value: float, asked: str
) -> None:
    model = random_model(CONFIGS["llama"])
    model.model.layers[1].input_layernorm.weight.data[3] = value
    visited: list[int] = []
    with pytest.raises(NonFiniteError, match=rf"layers\.1\.self_attn\.q_proj: its input.*{asked}"):
        walk(model, windows(), (asked,), lambda number, found: visited.append(number))
    assert visited == [0]


def test_an_activation_that_is_not_finite_is_an_error_even_if_its_expert_is_starved() -> None:
    model = random_model(CONFIGS["mixtral"])
    model.model.layers[0].post_attention_layernorm.weight.data[3] = float("nan")
    with pytest.raises(
        NonFiniteError, match=r"layers\.0\.mlp\.experts\.gate_up_proj\.\d: its input"
    ):
        walk(model, windows(1, 4), ("squared_norms",), look)
