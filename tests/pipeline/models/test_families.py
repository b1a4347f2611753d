"""Every type of causal language model in transformers: pruned as by brute force, or refused."""

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from pipeline.errors import InputError
from pipeline.models.layer_files import apply_masks
from pipeline.models.matrices import STARVED_TOKENS, decoder_layers, matrices
from pipeline.models.streaming import load_streamed
from pipeline.pruning.allocation import LayerTarget, ModelTarget
from pipeline.pruning.finished_layers import FinishedLayers
from pipeline.pruning.prune import PruneReport, prune_model
from pipeline.pruning.window_groups import Memory
from pipeline.specs import Wanda
from tests.pipeline.models.families import FAMILIES, NOT_BUILT, dense_model, model_of, windows

CHANGED = "changes the hidden states between its decoder layers"
NO_ENCODER = "takes no part in the forward pass"
SHARED = "belongs to decoder layers 1 and 2"
REFUSED = {
    **dict.fromkeys(
        (
            "bart",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "marian",
            "mbart",
            "mvp",
            "pegasus",
            "plbart",
            "prophetnet",
            "trocr",
            "whisper",
        ),
        NO_ENCODER,
    ),
    **dict.fromkeys(("reformer", "rwkv", "xlm"), CHANGED),
    **dict.fromkeys(("zamba", "zamba2"), SHARED),
    "hrm_text": "does not call its decoder layers one after another, once each",
    "xlnet": "belongs to no linear layer",
}
"""By model type, the reason why it cannot be pruned."""

PRUNED = [family for family in FAMILIES if family not in REFUSED]

ROUTERS = re.compile(
    r"\.(router|classifier|shared_expert_gate|modality_router|(correction|prediction)_coefs)(\.|$)"
    r"|\.(mlp|mixer|feed_forward|block_sparse_moe)\.gate(\.|$)|\.gate\.(down_proj|router_mlp)"
    r"|\.experts\.router\.|\.ffn\.router\.|_layernorm\.mlp\.|_hyper_connection\."
)
"""Linear layers that choose experts, mix streams or scale norms, by name alone."""


def prune(model: Any) -> PruneReport:
    return prune_model(
        model, windows(), Wanda(), ModelTarget(LayerTarget(0.5)), memory=Memory(batch_size=3)
    )


@functools.cache
def pruned(family: str) -> tuple[Any, PruneReport]:
    model = model_of(family)
    return model, prune(model)


def test_every_type_of_causal_language_model_is_tested_or_listed_as_not_tested() -> None:
    assert set(FAMILIES) | set(NOT_BUILT) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert set(REFUSED) < set(FAMILIES)


def test_the_page_about_models_lists_what_is_tested() -> None:
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
    _, pruned_here, refused_here, not_tried = page.split("\n## Types that ")
    names = re.compile(r"`([^`]+)`")
    assert names.findall(pruned_here.split("\n\n")[1]) == PRUNED
    rows = [line.split("|")[1] for line in refused_here.splitlines() if line.startswith("| `")]
    assert names.findall(" ".join(rows)) == list(REFUSED)
    rows = [line.split("|")[1] for line in not_tried.splitlines() if line.startswith("| `")]
    assert names.findall(" ".join(rows)) == list(NOT_BUILT)
    every = len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert f"all {every} types" in page
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    assert f"{len(PRUNED)} of transformers' {every} types" in " ".join(readme.split())


@pytest.mark.parametrize("family", REFUSED)
def test_a_type_that_cannot_be_pruned_is_refused_with_the_reason(family: str) -> None:
    with pytest.raises(InputError, match=REFUSED[family]):
        prune(model_of(family))


# ------------------------------------------------------------------------------- by brute force


class Inputs:
    """The inputs of each matrix of a decoder layer, `[tokens, in_features]` in float64, seen by
    hooks while windows go through the whole model one at a time."""

    def __init__(self, model: Any, prefix: str) -> None:
        self.seen: dict[str, list[Tensor]] = {}
        handles = [
            module.register_forward_hook(functools.partial(self._see, name), with_kwargs=True)
            for name, module in model.get_submodule(prefix).named_modules(prefix=prefix)
        ]
        with torch.no_grad():
            for window in windows():
                model(input_ids=window[None], use_cache=False)
        for handle in handles:
            handle.remove()

    def of(self, matrix: str) -> Tensor | None:
        """Return a matrix's inputs; None if it had none."""
        return torch.cat(self.seen[matrix]) if matrix in self.seen else None

    def _add(self, matrix: str, inputs: Tensor) -> None:
        self.seen.setdefault(matrix, []).append(inputs.flatten(0, -2).double())

    def _see(self, name: str, module: Any, given: Any, named: Any, output: Any) -> None:
        values = list(inspect.signature(module.forward).bind(*given, **named).arguments.values())
        see = BY_CLASS.get(type(module).__name__)
        if see is not None:
            see(self, name, module, values, output)
        elif isinstance(getattr(module, "is_transposed", None), bool):
            self.experts(name, module, values, output)
        elif isinstance(module, nn.Linear | Conv1D):
            self._add(name, values[0])

    def experts(self, name: str, module: Any, given: list[Any], output: Any) -> None:
        """The tokens and the chosen experts of each give an expert's inputs."""
        states, chosen = given[0].flatten(0, -2), given[1]
        first = "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"
        for expert in range(len(module.down_proj)):
            mine = states[(chosen == expert).any(dim=-1)]
            weight = getattr(module, first)[expert]
            both = mine @ (weight if getattr(module, "is_transposed", False) else weight.T)
            if hasattr(module, f"{first}_bias"):
                both = both + getattr(module, f"{first}_bias")[expert]
            if first == "up_proj":
                inner = module.act_fn(both)
            elif hasattr(module, "_apply_gate"):
                inner = module._apply_gate(both)
            else:
                gate, up = both.chunk(2, dim=-1)
                inner = module.act_fn(gate) * up
            self._add(f"{name}.{first}.{expert}", mine)
            self._add(f"{name}.down_proj.{expert}", inner)

    def llama4(self, name: str, module: Any, given: list[Any], output: Any) -> None:
        """Every expert gets all tokens times its score, which is zero for those that did not choose
        it."""
        for expert, states in enumerate(given[0].view(module.num_experts, -1, module.hidden_size)):
            mine = states[states.abs().sum(dim=-1) > 0]
            gate, up = (mine @ module.gate_up_proj[expert]).chunk(2, dim=-1)
            self._add(f"{name}.gate_up_proj.{expert}", mine)
            self._add(f"{name}.down_proj.{expert}", up * module.act_fn(gate))

    def jetmoe(self, name: str, module: Any, given: list[Any], output: Any) -> None:
        for expert, mine in enumerate(given[0].split(given[1])):
            self._add(f"{name}.weight.{expert}", mine)

    def dbrx(self, name: str, module: Any, given: list[Any], output: Any) -> None:
        glu = module.mlp
        shape = (-1, glu.ffn_hidden_size, glu.hidden_size)
        for expert, (w1, v1) in enumerate(zip(glu.w1.view(shape), glu.v1.view(shape), strict=True)):
            mine = given[0].flatten(0, -2)[(given[1] == expert).any(dim=-1)]
            self._add(f"{name}.mlp.w1.{expert}", mine)
            self._add(f"{name}.mlp.v1.{expert}", mine)
            self._add(f"{name}.mlp.w2.{expert}", glu.activation_fn(mine @ w1.T) * (mine @ v1.T))

    def inkling(self, name: str, module: Any, given: list[Any], output: Any) -> None:
        states, weights = given[0].flatten(0, -2), given[1].reshape(-1, module.n_shared_experts)
        for expert, (gate, up) in enumerate(zip(module.gate_proj, module.up_proj, strict=True)):
            inner = module.act_fn(states @ gate.T) * (states @ up.T) * weights[:, expert, None]
            self._add(f"{name}.gate_proj.{expert}", states)
            self._add(f"{name}.up_proj.{expert}", states)
            self._add(f"{name}.down_proj.{expert}", inner)

    def grouped(self, name: str, module: Any, given: list[Any], output: Any) -> None:
        for group in range(module.n_groups):
            self._add(f"{name}.weight.{group}", given[0][..., group, :])

    def mamba(self, name: str, module: Any, given: list[Any], output: Any) -> None:
        """`dt_proj` is not called as a module: it multiplies the first outputs of `x_proj`, normed
        in some classes."""
        outputs = self.seen[f"{name}.x_proj"][-1] @ module.x_proj.weight.double().T
        steps = outputs[:, : module.dt_proj.in_features]
        if hasattr(module, "dt_layernorm"):
            steps = module.dt_layernorm(steps.float())
        elif "Falcon" in type(module).__name__:
            scale = steps.square().mean(dim=-1, keepdim=True) + module.rms_eps
            steps = steps * scale.rsqrt()
        self._add(f"{name}.dt_proj", steps)


BY_CLASS: dict[str, Callable[[Inputs, str, Any, list[Any], Any], None]] = {
    "Llama4TextExperts": Inputs.llama4,
    "JetMoeParallelExperts": Inputs.jetmoe,
    "LongcatFlashExperts": Inputs.experts,
    "DbrxExperts": Inputs.dbrx,
    "InklingSharedExperts": Inputs.inkling,
    "DeepseekV4GroupedLinear": Inputs.grouped,
    "MambaMixer": Inputs.mamba,
    "FalconMambaMixer": Inputs.mamba,
    "JambaMambaMixer": Inputs.mamba,
}


@pytest.mark.parametrize("family", PRUNED)
def test_masks_are_those_of_hooks_on_the_whole_model_with_all_layers_below_pruned(
    family: str,
) -> None:
    """The half of each row with the smallest |W| ||X|| is zero, up to rounding of almost equal
    scores; experts that saw few tokens go by |W|. All else is unchanged."""
    after, report = pruned(family)
    before = model_of(family)
    root, layers = decoder_layers(before)
    done = 0
    for number, layer in enumerate(layers):
        prefix = f"{root}.{number}"
        inputs = Inputs(before, prefix)
        found = matrices(prefix, decoder_layers(after)[1][number])
        wanted = {name for name in inputs.seen if not ROUTERS.search(name)}
        unused = {each.name for each in found if each.is_expert and inputs.of(each.name) is None}
        assert {each.name for each in found} - unused == wanted
        dense = {each.name: each.weight for each in matrices(prefix, layer)}
        for matrix in found:
            given = inputs.of(matrix.name)
            if matrix.is_expert and (given is None or len(given) < STARVED_TOKENS):
                assert report.facts[matrix.name]["starved_tokens"] == (
                    0 if given is None else len(given)
                )
                given = torch.eye(matrix.weight.shape[1], dtype=torch.float64)
            assert given is not None
            scores = dense[matrix.name].double().abs() * given.square().sum(dim=0).sqrt()
            zero = matrix.weight == 0
            assert set(zero.sum(dim=1).tolist()) == {zero.shape[1] // 2}, matrix.name
            largest_gone = scores.masked_fill(~zero, 0.0).amax(dim=1)
            smallest_left = scores.masked_fill(zero, torch.inf).amin(dim=1)
            assert bool((largest_gone <= smallest_left * (1 + 1e-3)).all()), matrix.name
            kept = ~zero
            assert torch.equal(matrix.weight[kept], dense[matrix.name][kept])
            done += 1
        layer.load_state_dict(decoder_layers(after)[1][number].state_dict())
    assert done == len(report.matrices)
    for (name, one), (_, other) in zip(
        before.state_dict().items(), after.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), name  # with the matrices alike, nothing else differs


@pytest.mark.parametrize("family", PRUNED)
def test_each_parameter_of_a_layer_is_pruned_or_listed_as_dense_and_unchanged(family: str) -> None:
    model, report = pruned(family)
    before = dict(dense_model(family).named_parameters())
    listed = {each.name for each in report.dense}
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed != (name in listed), name
    for each in report.dense:
        assert each.shape == tuple(before[each.name].shape)


# -------------------------------------------------------------------------- from files, and back

OTHER_FORMS = [
    "dbrx",
    "deepseek_v4",
    "gemma3n_text",
    "hy_v4",
    "jamba",
    "jetmoe",
    "kimi_linear",
    "llama4_text",
    "minimax",
    "nemotron_h",
    "openai-gpt",
    "qwen3_next",
    "recurrent_gemma",
    "zaya",
]


@pytest.mark.parametrize("family", OTHER_FORMS)
def test_a_model_whose_layers_are_read_one_by_one_is_pruned_alike(
    family: str, tmp_path: Path
) -> None:
    source = tmp_path / "dense"
    dense_model(family).save_pretrained(source)
    scratch = tmp_path / "scratch"
    model = load_streamed(str(source), torch.float32, torch.device("cpu"), scratch).eval()
    masks = FinishedLayers(tmp_path / "masks", masks=True)
    prune_model(
        model,
        windows(),
        Wanda(),
        ModelTarget(LayerTarget(0.5)),
        memory=Memory(batch_size=3),
        finished=masks,
    )
    masked = model_of(family)
    apply_masks(masked, tmp_path / "masks")
    after, _ = pruned(family)
    for (name, one), (_, other) in zip(
        masked.state_dict().items(), after.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), name
