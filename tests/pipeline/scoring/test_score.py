import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pipeline.data.samples import SAMPLES_SCHEMA
from pipeline.errors import InputError, NonFiniteError
from pipeline.models import output_layer
from pipeline.models.output_layer import head_is_linear
from pipeline.scoring import score
from pipeline.scoring.mean_states import WIDTH, projection
from pipeline.scoring.score import (
    LEAST_DEVIATION,
    Score,
    distinct,
    position_scores,
    score_samples,
    score_with_states,
)
from pipeline.specs import FileCorpus, GenerateSpec, LocalModel, ScoreSpec
from tests.pipeline.tiny_models import TINY, seeded, tiny_llama

VOCABULARY = 96
LENGTHS = [24, 7, 13, 2, 19, 7, 31, 5]
PREFIXES = [3, 2, 1, 1, 4, 0, 3, 3]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(VOCABULARY)


@pytest.fixture(scope="module")
def capped_model() -> Any:
    sizes = {**TINY, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
    config = Gemma2Config(**sizes, head_dim=16, final_logit_softcapping=2.0)
    return seeded(lambda: Gemma2ForCausalLM(config))


@pytest.fixture(scope="module")
def token_ids() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(1, VOCABULARY, size=length).tolist() for length in LENGTHS]


def in_float64(model: Any, ids: list[int], first: int, fraction: float) -> Score:
    """All scores of one sample by their definitions, a token at a time."""
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(torch.tensor([ids])).logits[0].numpy()
    losses, normalised = [], []
    for place in range(max(1, first), len(ids)):
        row = logits[place - 1]
        log_p = row - row.max() - math.log(np.exp(row - row.max()).sum())
        mean = float(np.exp(log_p) @ log_p)
        deviation = math.sqrt(float(np.exp(log_p) @ (log_p - mean) ** 2))
        losses.append(-log_p[ids[place]])
        normalised.append((log_p[ids[place]] - mean) / deviation)
    count = len(losses)
    lowest = max(1, math.floor(fraction * count))
    ends = [math.floor(count / 4 * quarter) for quarter in range(5)]
    quarters = [losses[ends[part] : ends[part + 1]] for part in range(4)]
    written = ids[max(1, first) :]
    runs = [list(zip(*(written[at:] for at in range(n)), strict=False)) for n in (1, 2, 3)]
    return Score(
        count,
        math.exp(np.mean(losses)),
        -float(np.mean(sorted(losses, reverse=True)[:lowest])),
        float(np.mean(sorted(normalised)[:lowest])),
        *(float(np.mean(part)) if part else None for part in quarters),
        *(len(set(own)) / len(own) if own else None for own in runs),
    )


def agree(found: list[Score], expected: list[Score], rel: float = 1e-4) -> None:
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    for name in Score._fields:
        own, values = ([getattr(one, name) for one in scores] for scores in (found, expected))
        assert [value is None for value in own] == [value is None for value in values], name
        own, values = ([value for value in each if value is not None] for each in (own, values))
        assert own == pytest.approx(values, rel=rel, abs=1e-6), name


@pytest.mark.parametrize("fraction", [0.01, 0.2, 1.0])
@pytest.mark.parametrize("include_prefix", [False, True])
def test_scores_are_those_of_their_definitions_in_float64(
    model: Any, token_ids: list[list[int]], fraction: float, include_prefix: bool
) -> None:
    found = score_samples(
        model, token_ids, PREFIXES, include_prefix=include_prefix, min_k_fraction=fraction
    )
    firsts = [1 if include_prefix else prefix for prefix in PREFIXES]
    expected = [
        in_float64(model, ids, first, fraction)
        for ids, first in zip(token_ids, firsts, strict=True)
    ]
    agree(found, expected)
    perplexities = [one.perplexity for one in found]
    assert max(perplexities) > 1.5 * min(perplexities)  # so a constant would not pass


def test_scores_do_not_depend_on_batches_or_chunks(
    model: Any, token_ids: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = score_samples(model, token_ids, PREFIXES, batch_tokens=1)
    agree(score_samples(model, token_ids, PREFIXES), alone)
    agree(score_samples(model, token_ids, PREFIXES, batch_tokens=64), alone)
    agree(score_samples(model, token_ids, PREFIXES, chunked=False), alone)
    for layer, part in ((1, 1), (7, 3), (5, 7)):
        monkeypatch.setattr(output_layer, "LAYER_LOGITS", layer * VOCABULARY)
        monkeypatch.setattr(output_layer, "PART_LOGITS", part * VOCABULARY)
        agree(score_samples(model, token_ids, PREFIXES), alone)
        agree(score_samples(model, token_ids, PREFIXES, chunked=False), alone)


def test_logits_are_taken_a_few_positions_at_a_time(
    model: Any, token_ids: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_layer, "LAYER_LOGITS", 5 * VOCABULARY)
    sizes: list[int] = []
    hook = model.lm_head.register_forward_hook(
        lambda module, inputs, output: sizes.append(output.numel() // VOCABULARY)
    )
    try:
        found = score_samples(model, token_ids, PREFIXES, chunked=True)
    finally:
        hook.remove()
    assert max(sizes) == 5
    assert sum(sizes) == sum(one.tokens for one in found)


def test_capped_logits_are_detected_and_come_from_the_whole_forward_pass(
    model: Any, capped_model: Any, token_ids: list[list[int]]
) -> None:
    assert head_is_linear(model)
    assert not head_is_linear(capped_model)
    expected = [
        in_float64(capped_model, ids, prefix, 0.2)
        for ids, prefix in zip(token_ids, PREFIXES, strict=True)
    ]
    agree(score_samples(capped_model, token_ids, PREFIXES), expected)
    wrong = score_samples(capped_model, token_ids, PREFIXES, chunked=True)
    assert abs(wrong[0].perplexity / expected[0].perplexity - 1) > 0.05


POSITIONS = 16
ENTRIES = 50_000


def logits_of_kinds() -> dict[str, torch.Tensor]:
    """Logits [POSITIONS, ENTRIES]; each kind is numerically hard in its own way."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(POSITIONS, ENTRIES, generator=generator)
    kinds = {
        "random": 3 * normal,
        "bfloat16": (3 * normal).bfloat16().float(),
        "uniform": torch.full_like(normal, 7.0),
        "nearly uniform": 1e-2 * normal,
        "steep": 1e4 * normal,
        "far from zero": 3 * normal + 1e5,
        "huge": 1e33 * normal.sign(),
    }
    for name, height in (("peaked", 30.0), ("sigma near its floor", 35.0), ("certain", 90.0)):
        kinds[name] = normal.clone()
        kinds[name][:, 5] = height
    kinds["one above a plain"] = torch.full_like(normal, -0.05)
    kinds["one above a plain"][:, 5] = 0.0
    kinds["half ruled out"] = (3 * normal).masked_fill(normal < 0, -math.inf)
    kinds["all but two ruled out"] = torch.full_like(normal, -math.inf)
    kinds["all but two ruled out"][:, 5:7] = 3 * normal[:, 5:7]
    return kinds


KINDS = logits_of_kinds()
LOOSE = {"one above a plain": 2e-4}
"""Its sigma is 2e-4 and its mu -0.05, so z has 200 times the rounding of mu. The mean of squares
minus the square of the mean would be wrong by 1e-2."""


@pytest.mark.parametrize("kind", KINDS)
def test_log_p_and_z_of_any_logits_are_those_in_float64(kind: str) -> None:
    logits = KINDS[kind]
    targets = torch.arange(POSITIONS)  # the peak among them
    log_p = logits.double().log_softmax(dim=-1)
    probability = log_p.exp()
    finite = log_p.masked_fill(probability == 0, 0.0)
    mean = (probability * finite).sum(dim=-1)
    deviation = (probability * (finite - mean[:, None]).square()).sum(dim=-1).sqrt()
    own = log_p[torch.arange(POSITIONS), targets]
    normalised = (own - mean) / deviation.clamp(min=LEAST_DEVIATION)
    found = position_scores(logits.clone(), targets)
    assert found.log_probability.dtype == found.normalised.dtype == torch.float32
    tolerance = LOOSE.get(kind, 2e-6)
    torch.testing.assert_close(found.log_probability.double(), own, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        found.normalised.double(), normalised, rtol=tolerance, atol=tolerance
    )


def test_nan_logits_affect_only_their_own_position() -> None:
    logits = KINDS["random"].clone()
    logits[3, 17] = math.nan
    logits[4, :] = -math.inf
    logits[5, 17] = math.inf
    for scores in position_scores(logits, torch.arange(POSITIONS)):
        assert scores.isnan().nonzero().flatten().tolist() == [3, 4, 5]


def test_logits_in_half_precision_are_scored_in_float32(
    model: Any, token_ids: list[list[int]]
) -> None:
    half = copy.deepcopy(model).bfloat16()
    found = score_samples(half, token_ids, [1] * len(token_ids), batch_tokens=1)
    for ids, score_found in zip(token_ids, found, strict=True):
        with torch.no_grad():
            logits = half(torch.tensor([ids])).logits[0, :-1].double()
        own = logits.log_softmax(dim=-1).gather(1, torch.tensor(ids[1:])[:, None])
        assert score_found.perplexity == pytest.approx(float((-own.mean()).exp()), rel=1e-5)


def test_a_sample_without_a_token_to_score_has_no_score(model: Any) -> None:
    found = score_samples(model, [[1, 2, 3], [5], [4, 5, 6]], [3, 0, 2])
    assert [one.tokens for one in found] == [0, 0, 1]
    assert found[:2] == [(0, *[None] * 10)] * 2
    assert found[2].min_k == pytest.approx(-found[2].loss_4)  # the only token is the last quarter
    assert found[2].loss_1 is None


def test_repetition_lowers_the_share_of_different_runs() -> None:
    assert [distinct([5, 6, 5, 6, 5, 6, 5], length) for length in (1, 2, 3)] == [
        2 / 7,
        2 / 6,
        2 / 5,
    ]
    assert [distinct([1, 2, 3, 4], length) for length in (1, 2, 3)] == [1.0, 1.0, 1.0]
    assert distinct([1, 2], 3) is None


def test_under_a_uniform_model_no_token_is_unlikely(model: Any, token_ids: list[list[int]]) -> None:
    blank = copy.deepcopy(model)
    torch.nn.init.zeros_(blank.lm_head.weight)
    found = score_samples(blank, token_ids, PREFIXES)
    assert [one.perplexity for one in found] == pytest.approx([VOCABULARY] * 8, rel=1e-5)
    assert [one.min_k for one in found] == pytest.approx([-math.log(VOCABULARY)] * 8, rel=1e-5)
    assert [one.min_k_plus_plus for one in found] == pytest.approx([0.0] * 8, abs=0.05)


def test_a_model_that_is_certain_and_wrong_gives_finite_scores(
    model: Any, token_ids: list[list[int]]
) -> None:
    certain = copy.deepcopy(model)
    certain.lm_head.weight.data.mul_(1e2)
    found = score_samples(certain, token_ids, PREFIXES)
    assert all(math.isfinite(one.min_k_plus_plus) for one in found)
    assert all(one.min_k_plus_plus < -10 for one in found)
    assert all(one.perplexity > 1e6 for one in found)


def test_a_token_with_probability_zero_leaves_the_score_finite(
    model: Any, token_ids: list[list[int]]
) -> None:
    ruling = copy.deepcopy(model)
    ruling.lm_head = torch.nn.Linear(32, VOCABULARY)
    ruling.lm_head.weight.data.copy_(model.lm_head.weight.data)
    found = []
    for bias in (-1e4, -math.inf):
        ruling.lm_head.bias.data.zero_()[0] = bias  # no sample has token 0
        found.append(score_samples(ruling, token_ids, PREFIXES))
    agree(found[1], found[0])
    assert all(math.isfinite(one.min_k_plus_plus) for one in found[1])


def mean_states_of(model: Any, ids: list[int], first: int) -> list[float]:
    """The states after each third of the layers, by one text's own forward pass in float64."""
    with torch.no_grad():
        own = copy.deepcopy(model).double()
        states = own(torch.tensor([ids]), output_hidden_states=True).hidden_states
    count = len(states) - 1  # the first are the embeddings, the last were normalised
    with torch.no_grad():
        last = own.model.layers[-1](states[-2], position_embeddings=positions(own, states[-2]))
    after = {count: last if isinstance(last, torch.Tensor) else last[0]}
    after |= {place: states[place] for place in range(1, count)}
    chosen = sorted({math.ceil(count * third / 3) for third in (1, 2, 3)})
    means = torch.stack([after[place][0, first:].mean(dim=0) for place in chosen])
    return (means @ projection(means.shape[1]).double()).flatten().tolist()


def positions(model: Any, states: torch.Tensor) -> Any:
    return model.model.rotary_emb(states, torch.arange(states.shape[1])[None])


@pytest.mark.parametrize("layers", [1, 2, 3, 7])
@pytest.mark.parametrize("include_prefix", [False, True])
def test_mean_hidden_states_are_those_of_each_text_alone_in_float64(
    token_ids: list[list[int]], layers: int, include_prefix: bool
) -> None:
    config = LlamaConfig(**{**TINY, "num_hidden_layers": layers}, vocab_size=VOCABULARY)
    deep = seeded(lambda: LlamaForCausalLM(config))
    plain = score_samples(deep, token_ids, PREFIXES, include_prefix=include_prefix)
    for batch_tokens in (1, 60, 8192):
        scores, states = score_with_states(
            deep, token_ids, PREFIXES, include_prefix=include_prefix, batch_tokens=batch_tokens
        )
        agree(scores, plain)
        for ids, prefix, own in zip(token_ids, PREFIXES, states, strict=True):
            wanted = mean_states_of(deep, ids, 1 if include_prefix else max(1, prefix))
            assert own == pytest.approx(wanted, rel=1e-3, abs=1e-5)
            assert len(own or []) == min(layers, 3) * 128
    assert not any(layer._forward_hooks for layer in deep.model.layers)


def test_hidden_states_are_the_same_where_logits_come_from_the_whole_model(
    model: Any, token_ids: list[list[int]]
) -> None:
    _, chunked = score_with_states(model, token_ids, PREFIXES, chunked=True)
    _, full = score_with_states(model, token_ids, PREFIXES, chunked=False)
    assert chunked == full


def test_a_sample_without_a_scored_token_has_no_hidden_states(model: Any) -> None:
    scores, states = score_with_states(model, [[1, 2, 3], [5], [4, 5, 6]], [3, 0, 2])
    assert [score.tokens for score in scores] == [0, 0, 1]
    assert [own is None for own in states] == [True, True, False]


def test_states_that_are_not_finite_are_refused(model: Any, token_ids: list[list[int]]) -> None:
    """Where the output layer hides them: the last layer gives infinity and its norm leaves NaN."""
    broken = copy.deepcopy(model)
    broken.model.layers[0].register_forward_hook(lambda *_: torch.full_like(_[-1], math.inf))
    with pytest.raises(NonFiniteError, match=r"sample \d: .*layers\.0"):
        score_with_states(broken, token_ids, PREFIXES)


def test_the_projection_keeps_squared_distances_within_an_eighth() -> None:
    draws = torch.Generator().manual_seed(5)
    points = torch.randn(40, 700, generator=draws) * torch.linspace(0.1, 3, 700)
    there, here = (torch.pdist(each) ** 2 for each in (points, points @ projection(700)))
    ratios = here / there
    assert ratios.mean() == pytest.approx(1.0, abs=0.1)
    assert ratios.std() == pytest.approx((2 / WIDTH) ** 0.5, rel=0.3)


def saved(model: Any, folder: Path, word: str = "w") -> LocalModel:
    model.save_pretrained(folder)
    words = {f"{word}{number}": number for number in range(VOCABULARY)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token=f"{word}0"))
    ).save_pretrained(folder)
    return LocalModel(path=str(folder), dtype="float32")


def test_the_report_says_that_logits_were_not_chunked(
    capped_model: Any, token_ids: list[list[int]], tmp_path: Path
) -> None:
    local = saved(capped_model, tmp_path / "model")
    samples = GenerateSpec(model=local, prefixes=FileCorpus(path="texts.txt"), num_samples=1)
    spec = ScoreSpec(samples=samples, model=local)
    columns = {"sample_id": [0], "source": ["texts.txt"], "prefix_tokens": [1]}
    columns |= {"token_ids": token_ids[:1], "text": [""]}
    written, scored, joined = (tmp_path / name for name in ("written", "scored", "joined"))
    for folder in (written, scored, joined):
        folder.mkdir()
    pq.write_table(pa.table(columns, schema=SAMPLES_SCHEMA), written / "samples.parquet")
    reports = [
        score.run_shard(spec, 0, {samples.shards()[0].key: written}, scored),
        score.run(spec, {spec.shards()[0].key: scored}, joined),
    ]
    assert [one["logits"] for one in reports] == ["full"] * 2


def test_another_model_scores_only_ids_that_mean_the_same_to_it(
    model: Any, token_ids: list[list[int]], tmp_path: Path
) -> None:
    generator = saved(model, tmp_path / "generator")
    other = copy.deepcopy(model)
    other.lm_head.weight.data.mul_(0.5)
    alike = saved(other, tmp_path / "alike")
    unlike = saved(other, tmp_path / "unlike", word="v")
    samples = GenerateSpec(model=generator, prefixes=FileCorpus(path="texts.txt"), num_samples=8)
    columns = {
        "sample_id": range(8),
        "source": ["texts.txt"] * 8,
        "prefix_tokens": PREFIXES,
        "token_ids": token_ids,
        "text": [""] * 8,
    }
    pq.write_table(pa.table(columns, schema=SAMPLES_SCHEMA), tmp_path / "samples.parquet")
    artifacts = {samples.shards()[0].key: tmp_path}
    score.run_shard(ScoreSpec(samples=samples, model=alike), 0, artifacts, tmp_path)
    rows = pq.read_table(tmp_path / "scores.parquet").drop_columns("sample_id").to_pylist()
    agree([Score(**row) for row in rows], score_samples(other, token_ids, PREFIXES))
    with pytest.raises(InputError, match=r"scorer: '.*unlike': would read .*generator, whose voc"):
        score.run_shard(ScoreSpec(samples=samples, model=unlike), 0, artifacts, tmp_path)


@pytest.mark.parametrize("memory", [{}, {"memory_bytes": 1}], ids=["whole", "by layer"])
@pytest.mark.parametrize("hidden_states", [False, True])
def test_the_stage_scores_each_shard_from_its_own_samples_and_joins_them_in_order(
    model: Any,
    token_ids: list[list[int]],
    tmp_path: Path,
    hidden_states: bool,
    memory: dict[str, int],
) -> None:
    local = saved(model, tmp_path / "model")
    samples = GenerateSpec(
        model=local, prefixes=FileCorpus(path="texts.txt"), num_samples=8, shard_size=3
    )
    spec = ScoreSpec(samples=samples, model=local, hidden_states=hidden_states)
    artifacts: dict[str, Path] = {}
    reports = []
    for written, scored in zip(samples.shards(), spec.shards(), strict=True):
        numbers = list(range(8))[3 * written.index : 3 * written.index + 3][::-1]
        columns = {
            "sample_id": numbers,
            "source": ["texts.txt"] * len(numbers),
            "prefix_tokens": [PREFIXES[number] for number in numbers],
            "token_ids": [token_ids[number] for number in numbers],
            "text": [""] * len(numbers),
        }
        for part in (written, scored):
            artifacts[part.key] = tmp_path / part.key
            artifacts[part.key].mkdir()
        table = pa.table(columns, schema=SAMPLES_SCHEMA)
        pq.write_table(table, artifacts[written.key] / "samples.parquet")
        own = {written.key: artifacts[written.key]}
        reports.append(score.run_shard(spec, scored.index, own, artifacts[scored.key], **memory))
    assert [one.get("streamed", False) for one in reports] == [bool(memory)] * 3
    output = tmp_path / "joined"
    output.mkdir()
    report = score.run(spec, {part.key: artifacts[part.key] for part in spec.shards()}, output)
    rows = pq.read_table(output / "scores.parquet").to_pylist()
    expected, states = score_with_states(model, token_ids, PREFIXES)
    assert [row.pop("sample_id") for row in rows] == list(range(8))
    assert all(("hidden_states" in row) == hidden_states for row in rows)
    for row, own in zip(rows, states, strict=True):
        assert row.pop("hidden_states", own) == pytest.approx(own, rel=1e-4, abs=1e-6)
    agree([Score(**row) for row in rows], expected)
    assert [one["logits"] for one in (*reports, report)] == ["chunked"] * 4
    assert sum(one["tokens"] for one in reports) == report["tokens"]
    assert report["samples"] == 8
    assert report["tokens"] == sum(one.tokens for one in expected)
    assert report["invalid"] == 0
    middle = float(np.median([one.perplexity for one in expected]))
    assert report["median_perplexity"] == pytest.approx(middle, rel=1e-4)
