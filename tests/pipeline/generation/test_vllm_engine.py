"""The real engine on the trained testbed model. Most of these tests share one engine."""

import copy
import importlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.stats
import torch
from transformers import GenerationConfig

from pipeline.data.prefixes import read_prefixes
from pipeline.data.samples import Sample
from pipeline.errors import EngineDiedError, InputError, NonFiniteError
from pipeline.generation import generate, vllm_engine
from pipeline.generation.generate import generate_samples, loaded_engine
from pipeline.generation.sampling import Sampling, request_seed
from pipeline.generation.transformers_engine import TransformersEngine
from pipeline.generation.vllm_engine import (
    CPU_BLOCK_TOKENS,
    STARTING,
    VllmEngine,
    cpu_cache_bytes,
    vllm_version,
)
from pipeline.models.loading import load_configs, load_model, load_tokenizer
from pipeline.progress import reporting
from pipeline.pruning import prune
from pipeline.specs import (
    GenerateSpec,
    HubModel,
    LocalModel,
    Magnitude,
    PruneSpec,
    TestbedCorpus,
    Vllm,
)
from tests.pipeline.generation.oracle import all_logits, next_probabilities

needs_vllm = pytest.mark.skipif(
    vllm_version() is None,
    reason="vLLM is not installed; `make test` installs its CPU build where the machine has "
    "AVX2 or AVX-512 and torch is the CPU build that it goes with",
)

SEQLEN = 48


@pytest.fixture(autouse=True)
def _without_flask(without_flask: Any) -> Iterator[None]:
    with without_flask():
        yield


@pytest.fixture(scope="session")
def spec(tiny_model_folder: Path) -> GenerateSpec:
    return GenerateSpec(
        model=LocalModel(path=str(tiny_model_folder / "model"), dtype="float32"),
        prefixes=TestbedCorpus(mixture={"facts": 1.0, "code": 1.0}),
        num_samples=32,
        seqlen=SEQLEN,
        shard_size=16,
        backend=Vllm(enforce_eager=True),
    )


@pytest.fixture(scope="session")
def tokenizer(spec: GenerateSpec) -> Any:
    return load_tokenizer(spec.model, {})


@pytest.fixture(scope="session")
def model(spec: GenerateSpec) -> Any:
    return load_model(spec.model, {})


@pytest.fixture(scope="session")
def engine(spec: GenerateSpec, without_flask: Any) -> VllmEngine:
    with without_flask():
        engine, _ = loaded_engine(spec, {})
    assert isinstance(engine, VllmEngine)
    return engine


@pytest.fixture(scope="session")
def prefixes(spec: GenerateSpec, tokenizer: Any) -> list[list[int]]:
    """Prefixes of several lengths, one of them BOS alone."""
    found = read_prefixes(spec, tokenizer)
    longer = read_prefixes(spec.model_copy(update={"prefix_tokens": 9}), tokenizer)
    return [found[0][:1], *found[1:16], *longer[16:]]


def generated(
    engine: Any, tokenizer: Any, prefixes: list[list[int]], sampling: Sampling, seed: int = 3
) -> list[Sample]:
    numbers = list(range(len(prefixes)))
    return generate_samples(
        engine, tokenizer, prefixes, numbers, sampling=sampling, seqlen=SEQLEN, seed=seed
    )


# --------------------------------------------------------------------------------- with the engine


@needs_vllm
def test_greedy_text_is_that_of_transformers_token_for_token(
    engine: VllmEngine, model: Any, tokenizer: Any, prefixes: list[list[int]]
) -> None:
    greedy = Sampling(temperature=0.0, repetition_penalty=1.2)
    ours = generated(engine, tokenizer, prefixes, greedy)
    theirs = generated(TransformersEngine(model), tokenizer, prefixes, greedy)
    for one, other in zip(ours, theirs, strict=True):
        if one.token_ids == other.token_ids:
            continue
        # Only a tie in float32 may part them.
        pairs = zip(one.token_ids, other.token_ids, strict=False)
        place = next(n for n, (a, b) in enumerate(pairs) if a != b)
        logits = all_logits(model, one.token_ids[:place])[-1]
        gap = logits[one.token_ids[place]] - logits[other.token_ids[place]]
        assert abs(gap) < 1e-3
    assert len({len(sample.token_ids) for sample in ours}) > 1  # some end with EOS


@needs_vllm
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.0, repetition_penalty=1.2)])
def test_prefixes_are_kept_exactly_and_texts_end_with_eos_or_at_the_length(
    engine: VllmEngine, tokenizer: Any, prefixes: list[list[int]], sampling: Sampling
) -> None:
    samples = generated(engine, tokenizer, prefixes, sampling)
    for sample, prefix in zip(samples, prefixes, strict=True):
        assert sample.token_ids[: len(prefix)] == prefix
        assert sample.prefix_tokens == len(prefix)
        written = sample.token_ids[len(prefix) :]
        assert tokenizer.eos_token_id not in written[:-1]
        assert len(sample.token_ids) == SEQLEN or written[-1] == tokenizer.eos_token_id


@needs_vllm
@pytest.mark.parametrize(
    "sampling", [Sampling(1.0, 0, 1.0, 1.0), Sampling(), Sampling(1.5, 40, 0.9, 1.5)]
)
def test_first_tokens_are_drawn_as_often_as_their_probability_says(
    engine: VllmEngine, model: Any, tokenizer: Any, prefixes: list[list[int]], sampling: Sampling
) -> None:
    prefix = prefixes[1]
    draws = engine.write(
        [prefix] * 1500,
        range(1500),
        [tokenizer.eos_token_id],
        range(len(tokenizer)),
        sampling=sampling,
        seqlen=len(prefix) + 1,
        seed=5,
    )
    expected = 1500 * next_probabilities(all_logits(model, prefix)[-1], prefix, sampling)
    counts = np.bincount([ids[0] for ids in draws], minlength=len(expected))
    assert not counts[expected == 0].any()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    awaited = np.append(expected[~rare], expected[rare].sum())
    present = awaited > 0
    assert present.sum() > 2
    assert scipy.stats.chisquare(observed[present], awaited[present]).pvalue > 1e-3


@needs_vllm
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "coarse"])
@pytest.mark.parametrize("top_k", [1, 50, 290, 10_000])
@pytest.mark.parametrize("top_p", [0.1, 0.95, 0.999])
def test_the_kept_logits_equal_those_that_vllm_keeps(kind: str, top_k: int, top_p: float) -> None:
    """The kept logits have equal bits, so the same tokens are drawn; coarse logits tie at both
    limits."""
    operations = importlib.import_module("vllm.v1.sample.ops.topk_topp_sampler")
    keep_top_k_top_p = importlib.import_module("pipeline.generation.vllm_sampling").keep_top_k_top_p
    generator = torch.Generator().manual_seed(0)
    for vocabulary in (65, 300, 5000):
        logits = torch.randn(40, vocabulary, generator=generator) * 4 + 12
        if kind == "bfloat16":
            logits = logits.bfloat16().float() / 0.6
        if kind == "coarse":
            logits = logits.round()
        k = torch.full((40,), min(top_k, vocabulary), dtype=torch.int32)
        expected = operations.apply_top_k_top_p(logits.clone(), k, torch.full((40,), top_p))
        assert torch.equal(keep_top_k_top_p(logits.clone(), top_k, top_p), expected)


@needs_vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU vLLM does this itself")
def test_top_k_before_top_p_writes_what_vllm_writes_by_itself(
    engine: VllmEngine, tokenizer: Any, prefixes: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = generated(engine, tokenizer, prefixes, Sampling())
    with monkeypatch.context() as patch:
        patch.setattr(engine, "on_cpu", False)
        by_vllm = generated(engine, tokenizer, prefixes, Sampling())
    assert ours == by_vllm
    # The settings of one shard must not stay for the next.
    wide = Sampling(1.0, 0, 1.0)
    assert generated(engine, tokenizer, prefixes, wide) != by_vllm
    narrow = generated(engine, tokenizer, prefixes, Sampling(1.0, 2, 0.99))
    assert narrow != generated(engine, tokenizer, prefixes, wide)


@needs_vllm
def test_the_penalty_falls_on_prefix_and_text_so_far(
    engine: VllmEngine, model: Any, tokenizer: Any, prefixes: list[list[int]]
) -> None:
    strong = Sampling(temperature=0.0, repetition_penalty=3.0)
    for sample in generated(engine, tokenizer, prefixes[:8], strong):
        ids = sample.token_ids
        logits = all_logits(model, ids)
        for place in range(sample.prefix_tokens, len(ids)):
            scores = logits[place - 1].copy()
            for token in set(ids[:place]):
                scores[token] = scores[token] / 3 if scores[token] > 0 else scores[token] * 3
            assert scores[ids[place]] > scores.max() - 1e-3


@needs_vllm
def test_a_samples_draws_do_not_depend_on_its_batch(
    engine: VllmEngine, tokenizer: Any, prefixes: list[list[int]]
) -> None:
    together = generated(engine, tokenizer, prefixes, Sampling())
    few = generated(engine, tokenizer, prefixes[:5], Sampling())
    assert few == together[:5]
    other = generated(engine, tokenizer, prefixes, Sampling(), seed=4)
    assert sum(a == b for a, b in zip(together, other, strict=True)) < 4


@needs_vllm
def test_a_text_that_eos_ends_at_once_has_no_generated_token(
    engine: VllmEngine, tokenizer: Any, prefixes: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    every = GenerationConfig(eos_token_id=list(range(len(tokenizer))))
    monkeypatch.setattr(engine, "generation_config", every)
    samples = generated(engine, tokenizer, prefixes[:4], Sampling())
    assert [sample.token_ids for sample in samples] == prefixes[:4]


@needs_vllm
def test_no_sample_ends_before_min_new_tokens(
    engine: VllmEngine, tokenizer: Any, prefixes: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    many = GenerationConfig(eos_token_id=list(range(0, len(tokenizer), 2)))
    monkeypatch.setattr(engine, "generation_config", many)
    for least in (0, 6):
        samples = generated(engine, tokenizer, prefixes, Sampling(1.0, min_new_tokens=least))
        lengths = [len(sample.token_ids) - sample.prefix_tokens for sample in samples]
        assert (min(lengths) > 6) == (least == 6)
        for sample in samples:
            written = sample.token_ids[sample.prefix_tokens :]
            assert all(token % 2 for token in written[:least])


@needs_vllm
def test_the_engine_leaves_threads_and_random_numbers_as_they_were(engine: VllmEngine) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)  # vLLM replaces this by a function that does nothing
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert engine.facts == {
        "backend": "vllm",
        "backend_version": vllm_version(),
        "device": "cpu" if not torch.cuda.is_available() else torch.cuda.get_device_name(),
    }


@needs_vllm
def test_an_engine_that_breaks_is_reported_as_dead(
    engine: VllmEngine, tokenizer: Any, prefixes: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any, **options: Any) -> None:
        raise RuntimeError("worker proc died unexpectedly")

    monkeypatch.setattr(engine.engine, "generate", broken)
    with pytest.raises(EngineDiedError, match="worker proc died unexpectedly"):
        generated(engine, tokenizer, prefixes, Sampling())


def written_shards(
    spec: GenerateSpec, order: tuple[int, ...], folder: Path
) -> dict[int, tuple[bytes, dict[str, Any]]]:
    """The bytes and the report of each shard."""
    shards = {}
    for index in order:
        output = folder / str(index)
        output.mkdir()
        report = generate.run_shard(spec, index, {}, output)
        shards[index] = ((output / "samples.parquet").read_bytes(), report)
    return shards


class SecondEngine(NamedTuple):
    """An engine of a model stored as masks that replaced the first, and the state before it."""

    engine: VllmEngine
    pruned: PruneSpec
    artifacts: dict[str, Path]
    phases: list[str]
    """Phases reported while the engine started."""
    first_shards: dict[int, tuple[bytes, dict[str, Any]]]
    """Texts of the first engine."""


@pytest.fixture(scope="module")
def second_engine(
    spec: GenerateSpec,
    engine: VllmEngine,
    without_flask: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> SecondEngine:
    """Close the first engine; the last tests use this one."""
    shards = written_shards(spec, (0, 1), tmp_path_factory.mktemp("first"))
    pruned = PruneSpec(model=spec.model, pruner=Magnitude(), sparsity=0.6)
    folder = tmp_path_factory.mktemp("pruned")
    prune.run(pruned, {}, folder)
    artifacts = {pruned.key: folder}
    phases: dict[str, None] = {}
    with (
        without_flask(),
        reporting(lambda phase, done, total, unit: phases.setdefault(phase)),
    ):
        sparse, _ = loaded_engine(spec.model_copy(update={"model": pruned}), artifacts)
    assert isinstance(sparse, VllmEngine)
    return SecondEngine(sparse, pruned, artifacts, list(phases), shards)


@needs_vllm
def test_a_model_that_is_stored_as_masks_writes_as_it_does_with_transformers(
    second_engine: SecondEngine, model: Any, tokenizer: Any, prefixes: list[list[int]]
) -> None:
    started = [phase for phase in second_engine.phases if "vLLM" in phase]
    assert started == ["importing vLLM", STARTING]
    sparse = load_model(second_engine.pruned, second_engine.artifacts)
    greedy = Sampling(temperature=0.0, repetition_penalty=1.2)
    ours = generated(second_engine.engine, tokenizer, prefixes, greedy)
    theirs = generated(TransformersEngine(sparse), tokenizer, prefixes, greedy)
    dense = generated(TransformersEngine(model), tokenizer, prefixes, greedy)
    assert sum(one == other for one, other in zip(ours, theirs, strict=True)) >= 30  # of 32
    assert sum(one == other for one, other in zip(ours, dense, strict=True)) < 16


@needs_vllm
def test_another_engine_writes_the_same_bytes_in_any_order_of_shards(
    spec: GenerateSpec, engine: VllmEngine, second_engine: SecondEngine, tmp_path: Path
) -> None:
    assert second_engine.engine is not engine  # only one is kept, so this is the third
    shards = written_shards(spec, (1, 0), tmp_path)
    assert shards == second_engine.first_shards
    rows = pq.read_table(tmp_path / "1" / "samples.parquet").to_pylist()
    assert [row["sample_id"] for row in rows] == list(range(16, 32))
    assert shards[0][1]["engines"][0]["backend"] == "vllm"


@needs_vllm
def test_only_the_ends_of_a_checkpoints_settings_are_used_and_padding_rows_are_never_drawn(
    spec: GenerateSpec, model: Any, tokenizer: Any, prefixes: list[list[int]], tmp_path: Path
) -> None:
    """The same engine then gives NaN, an error that names the sample."""
    bent = copy.deepcopy(model)
    fillers = range(len(tokenizer), len(tokenizer) + 40)
    bent.resize_token_embeddings(fillers.stop, mean_resizing=False)
    bent.lm_head.weight.data[fillers] = 5 * bent.lm_head.weight.data[40:80]
    bent.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    own = {"repetition_penalty": 9.0, "temperature": 5.0, "top_k": 1, "eos_token_id": [1, 50]}
    own |= {"suppress_tokens": [60], "bad_words_ids": [[61]], "min_length": 40, "max_length": 20}
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    folder = LocalModel(path=str(tmp_path), dtype="float32")
    engine = VllmEngine(spec.model_copy(update={"model": folder}), {})
    greedy = Sampling(temperature=0.0, repetition_penalty=1.2)
    ours = generated(engine, tokenizer, prefixes, greedy)
    theirs = generated(TransformersEngine(load_model(folder, {})), tokenizer, prefixes, greedy)
    assert sum(one == other for one, other in zip(ours, theirs, strict=True)) >= 30  # of 32
    for sample in [*ours, *generated(engine, tokenizer, prefixes, Sampling(1.5, 0, 1.0))]:
        written = sample.token_ids[sample.prefix_tokens :]
        assert max(sample.token_ids) < len(tokenizer)
        assert not {1, 50} & set(written[:-1])
    executor = engine.engine.llm_engine.engine_core.engine_core.model_executor
    (loaded,) = executor.collective_rpc("get_model")
    loaded.model.norm.weight.data[7] = torch.nan
    with pytest.raises(NonFiniteError, match=r"sample 0, new token 1: .*NaN or infinite:"):
        generated(engine, tokenizer, prefixes, greedy)
    engine.close()


# ------------------------------------------------------------------------------ without the engine


def test_the_error_without_vllm_says_what_to_install(
    spec: GenerateSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "vllm_version", lambda: None)
    with pytest.raises(InputError, match=r"install calprune\[vllm\]"):
        VllmEngine(spec, {})


def test_every_sample_has_its_own_seed() -> None:
    seeds = [request_seed(seed, sample) for seed, sample in itertools.product(range(9), range(99))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(2, 5) == seeds[2 * 99 + 5]


def test_the_cache_of_a_cpu_holds_every_sample_of_a_shard(spec: GenerateSpec) -> None:
    config, settings = load_configs(spec.model, {})
    token = 2 * 2 * 1 * 32 * 4  # keys and values, 2 layers, 1 head of 32, float32
    assert cpu_cache_bytes(spec.model, config, 16, SEQLEN) == (16 + 1) * CPU_BLOCK_TOKENS * token
    assert settings.eos_token_id == config.eos_token_id


@pytest.mark.parametrize("temperature", [0.0, 0.01, 0.6])
def test_temperatures_that_vllm_supports_are_accepted(temperature: float) -> None:
    made = GenerateSpec(
        model=HubModel(name="m"),
        prefixes=TestbedCorpus(mixture={"facts": 1.0}),
        temperature=temperature,
        backend=Vllm(),
    )
    assert made.temperature == temperature


def test_a_temperature_that_vllm_would_increase_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no temperature between 0 and 0\.01"):
        GenerateSpec(
            model=HubModel(name="m"),
            prefixes=TestbedCorpus(mixture={"facts": 1.0}),
            temperature=0.005,
            backend=Vllm(),
        )
