"""KL divergence from the dense model and changes of the most likely token."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import pipeline.models.output_layer
from pipeline.errors import NonFiniteError
from pipeline.evaluation import evaluate
from pipeline.evaluation.divergence import Compared, compare_with_dense
from pipeline.evaluation.perplexity import ScoredWindow, losses
from pipeline.models.output_layer import OutputLayer
from pipeline.pruning import prune
from pipeline.specs import (
    EvaluateSpec,
    FileCorpus,
    LocalModel,
    Magnitude,
    PerplexitySpec,
    PretrainSpec,
    PruneSpec,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
}


def pair(kind: str) -> tuple[Any, Any]:
    """A random model, and the same with 60 % of each matrix at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense: Any
        if kind == "llama":
            dense = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
        else:  # it caps its logits, so all of them come from the forward pass
            dense = Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=16)).eval()
    pruned = copy.deepcopy(dense)
    for layer in pruned.model.layers:
        for weight in (each for each in layer.parameters() if each.dim() == 2):
            weight.data[weight.abs() < weight.abs().quantile(0.6)] = 0
    return pruned, dense


def windows() -> list[ScoredWindow]:
    draws = np.random.default_rng(1)
    return [
        ScoredWindow(draws.integers(0, SHAPE["vocab_size"], size), first, 1, 1)
        for size, first in ((23, 1), (40, 1), (9, 4), (31, 30))
    ]


def in_float64(pruned: Any, dense: Any, window: ScoredWindow) -> Compared:
    """One position at a time, by the definition."""
    both = []
    for model in (pruned, dense):
        with torch.no_grad():
            logits = copy.deepcopy(model).double()(torch.from_numpy(window.ids)[None]).logits[0]
        both.append(torch.softmax(logits, dim=-1))
    loss = kl = changes = 0.0
    for place in range(window.first, len(window.ids)):
        q, p = (each[place - 1] for each in both)
        loss -= math.log(float(q[window.ids[place]]))
        kl += sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))
        changes += int(p.argmax()) != int(q.argmax())
    return Compared(loss, kl, changes)


@pytest.fixture(params=[2**19, 61 * 5])
def part_logits(request: pytest.FixtureRequest) -> Iterator[None]:
    """One part a batch, and parts of five tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.models.output_layer, "PART_LOGITS", request.param)
        yield


@pytest.mark.usefixtures("part_logits")
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_sums_by_window_are_those_of_the_definition_in_float64(kind: str) -> None:
    pruned, dense = pair(kind)
    layers = OutputLayer(pruned), OutputLayer(dense)
    assert layers[0].chunked == (kind == "llama")
    (found,) = compare_with_dense(*layers, [windows()])
    for window, each in zip(windows(), found, strict=True):
        wanted = in_float64(pruned, dense, window)
        np.testing.assert_allclose(each, wanted, rtol=1e-4, atol=1e-5)
    assert sum(each.top_token_changes for each in found) > 1
    assert min(each.kl for each in found) > 0


def test_a_model_does_not_diverge_from_itself_and_its_losses_are_the_perplexitys() -> None:
    _, dense = pair("llama")
    layer = OutputLayer(dense)
    (found,) = compare_with_dense(layer, layer, [windows()])
    assert [[each.loss for each in found]] == list(losses(layer, [windows()]))
    assert {(each.kl, each.top_token_changes) for each in found} == {(0.0, 0.0)}


def test_the_divergence_is_from_the_dense_model_and_not_the_reverse() -> None:
    """p is uniform over n entries, q has one of them three times as likely as each other."""
    one = pair("llama")[1]
    one.model.norm.weight.data.zero_()  # all logits are 0: uniform over 61 entries
    layer = OutputLayer(one, chunked=True)

    class Shifted(OutputLayer):
        """The same with log 3 added to the logit of token 0."""

        def logits(self, *arguments: Any) -> Iterator[Any]:
            for part, logits in super().logits(*arguments):
                logits[:, 0] += math.log(3)
                yield part, logits

    window = ScoredWindow(np.array([1, 2]), 1, 1, 1)
    ((found,),) = compare_with_dense(Shifted(one, chunked=True), layer, [[window]])
    n = SHAPE["vocab_size"]
    assert found.kl == pytest.approx(math.log((n + 2) / n) - math.log(3) / n, abs=1e-6)
    ((reverse,),) = compare_with_dense(layer, Shifted(one, chunked=True), [[window]])
    total = n + 2
    exact = 3 / total * math.log(3 * n / total) + (n - 1) / total * math.log(n / total)
    assert reverse.kl == pytest.approx(exact, abs=1e-6)


# ------------------------------------------------------------------------------------------- stage


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "probe.txt"
    path.write_text("Anna lives in Rome. Bo lives in Oslo.\n" * 12)
    return path


@pytest.fixture(scope="module")
def pruned(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    dense = LocalModel(path=str(tiny_model_folder / "model"), dtype="float32")
    spec = PruneSpec(model=dense, pruner=Magnitude(), sparsity=0.6)
    folder = tmp_path_factory.mktemp("pruned")
    prune.run(spec, {}, folder)
    return {"spec": spec, "artifacts": {spec.key: folder}}


def measured(pruned: dict[str, Any], text_file: Path, output: Path, *, kl: bool) -> dict[str, Any]:
    entry = PerplexitySpec(
        name="probe", corpus=FileCorpus(path=str(text_file)), seqlen=16, max_windows=6, kl=kl
    )
    output.mkdir()
    spec = EvaluateSpec(model=pruned["spec"], perplexity=(entry,), batch_tokens=40)
    evaluate.run(spec, pruned["artifacts"], output)
    rows = pq.read_table(output / "metrics.parquet").to_pylist()
    return {row["metric"]: row for row in rows}


def test_an_evaluation_with_kl_adds_numbers_and_changes_none(
    pruned: dict[str, Any], text_file: Path, tmp_path: Path
) -> None:
    without = measured(pruned, text_file, tmp_path / "without", kl=False)
    rows = measured(pruned, text_file, tmp_path / "with", kl=True)
    assert {name: rows[name] for name in without} == without
    assert rows.keys() - without.keys() == {"kl", "top_token_changes"}
    requests = pq.read_table(tmp_path / "with" / "requests.parquet").to_pylist()
    for name in ("kl", "top_token_changes"):
        each = [row["value"] for row in requests if row["metric"] == name]
        assert len(each) == rows[name]["samples"] == 6
        assert rows[name]["value"] == pytest.approx(np.mean(each))
        # Windows of 15 scored tokens: the plain standard error of a mean.
        assert rows[name]["stderr"] == pytest.approx(np.std(each, ddof=1) / math.sqrt(6))
        assert rows[name]["value"] > 0


def test_a_dense_model_that_gives_nan_is_the_error_and_is_named(
    pruned: dict[str, Any], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = evaluate.open_model

    def broken(spec: Any, *rest: Any) -> Any:
        model = load(spec, *rest)
        if not isinstance(spec, PruneSpec):
            model.model.layers[0].mlp.up_proj.weight.data.fill_(math.nan)
        return model

    monkeypatch.setattr(evaluate, "open_model", broken)
    with pytest.raises(NonFiniteError, match=r"probe, window \d+, dense model: .*layers\.0"):
        measured(pruned, text_file, tmp_path / "broken", kl=True)


def test_only_a_pruned_model_is_compared_and_its_dense_one_is_an_input(text_file: Path) -> None:
    entry = PerplexitySpec(name="probe", corpus=FileCorpus(path=str(text_file)), kl=True)
    dense = PretrainSpec(mixture={"facts": 1.0})
    with pytest.raises(ValidationError, match="leave kl out"):
        EvaluateSpec(model=dense, perplexity=(entry,))
    pruned = PruneSpec(model=dense, pruner=Magnitude(), sparsity=0.5, checkpoint=True)
    spec = EvaluateSpec(model=pruned, perplexity=(entry,))
    assert [stage.key for stage in spec.inputs()] == [pruned.key, dense.key]
    plain = EvaluateSpec(model=pruned, perplexity=(entry.model_copy(update={"kl": False}),))
    assert [stage.key for stage in plain.inputs()] == [pruned.key]
    assert "kl" not in plain.lineage["perplexity"][0]
    assert spec.key != plain.key
