import copy
import itertools
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from pipeline.data.prefixes import adds_bos, first_ids, read_prefixes, text_prefixes
from pipeline.data.samples import Sample
from pipeline.errors import InputError, NonFiniteError
from pipeline.generation import generate
from pipeline.generation.generate import generate_samples
from pipeline.generation.sampling import (
    Draw,
    RepetitionPenalty,
    Sampling,
    Temperature,
    logits_processors,
    redraw_seed,
    request_seed,
    uniform_numbers,
)
from pipeline.generation.shards import join_shards
from pipeline.generation.transformers_engine import (
    FiniteLogits,
    PreallocatedLayer,
    TransformersEngine,
    preallocated_cache,
)
from pipeline.models.loading import loaded
from pipeline.models.vocabulary import end_ids
from pipeline.scoring.score import score_samples
from pipeline.specs import FileCorpus, GenerateSpec, LocalModel, TestbedCorpus
from tests.pipeline.generation.oracle import all_logits, next_probabilities, penalised
from tests.pipeline.tiny_models import seeded, tiny_llama

BOS, EOS = 0, 1
TEXTS = [
    "the cat sat on the mat and the dog sat on the cat",
    "a",
    "rain in the north, sun in the south; snow on the hills",
    "one two three four five six seven eight nine ten",
    "the sea is blue",
    "no two dogs are the same",
    "over the hills and far away",
    "a stitch in time saves nine",
    "the end of the road is near",
]
GREEDY = Sampling(temperature=0.0, repetition_penalty=1.2)


def make_tokenizer(*, with_bos: bool, **special: str) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[AddedToken("<s>", special=True), AddedToken("</s>", special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **(special or {"bos_token": "<s>", "eos_token": "</s>"})
    )


WITH_BOS = make_tokenizer(with_bos=True)
WITHOUT_BOS = make_tokenizer(with_bos=False)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(len(WITH_BOS), bos_token_id=BOS, eos_token_id=EOS)


@pytest.fixture(scope="module")
def gpt2() -> Any:
    config = GPT2Config(
        vocab_size=len(WITH_BOS),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=EOS,
        eos_token_id=EOS,
    )
    return seeded(lambda: GPT2LMHeadModel(config))


@pytest.fixture(scope="module")
def spec(model: Any, tmp_path_factory: pytest.TempPathFactory) -> GenerateSpec:
    folder = tmp_path_factory.mktemp("inputs")
    model.save_pretrained(folder / "model")
    WITH_BOS.save_pretrained(folder / "model")
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    return GenerateSpec(
        model=LocalModel(path=str(folder / "model"), dtype="float32"),
        prefixes=FileCorpus(path=str(folder / "texts.txt")),
        num_samples=8,
        prefix_tokens=3,
        seqlen=24,
        temperature=1.0,
        shard_size=8,
    )


def changed(spec: GenerateSpec, **fields: Any) -> GenerateSpec:
    return GenerateSpec.model_validate({**spec.model_dump(), **fields})


def made(spec: GenerateSpec, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run all shards, last first, and the join; return the rows and the report."""
    artifacts = {}
    for shard in reversed(spec.shards()):
        artifacts[shard.key] = folder / shard.key
        artifacts[shard.key].mkdir(parents=True)
        generate.run_shard(spec, shard.index, artifacts, artifacts[shard.key])
    output = folder / "joined"
    output.mkdir()
    report = generate.run(spec, artifacts, output)
    return pq.read_table(output / "samples.parquet").to_pylist(), report


def generated(
    model: Any, prefixes: list[list[int]], sampling: Sampling, first: int = 0, seqlen: int = 24
) -> list[Sample]:
    numbers = range(first, first + len(prefixes))
    engine = TransformersEngine(model)
    return generate_samples(
        engine, WITH_BOS, prefixes, list(numbers), sampling=sampling, seqlen=seqlen, seed=3
    )


# --------------------------------------------------------------------------------------- prefixes


def test_bos_comes_first_once_and_only_if_the_tokenizer_adds_it() -> None:
    long = [text for text in TEXTS if len(text) > 1]
    assert adds_bos(WITH_BOS)
    assert not adds_bos(WITHOUT_BOS)
    assert list(text_prefixes(long, WITH_BOS, 3)) == [WITH_BOS(t)["input_ids"][:4] for t in long]
    assert list(text_prefixes(long, WITHOUT_BOS, 3)) == [
        WITHOUT_BOS(text)["input_ids"][:3] for text in long
    ]
    assert all(ids.count(BOS) == 1 for ids in text_prefixes(long, WITH_BOS, 3))
    assert all(BOS not in ids for ids in text_prefixes(long, WITHOUT_BOS, 3))


def test_texts_with_too_few_tokens_are_skipped() -> None:
    assert len(WITHOUT_BOS("a")["input_ids"]) == 1
    assert len(list(text_prefixes(["a", TEXTS[0], "a"], WITHOUT_BOS, 1))) == 3
    assert len(list(text_prefixes(["a", TEXTS[0], "a"], WITHOUT_BOS, 2))) == 1


@settings(max_examples=50, deadline=None)
@given(
    words=st.lists(st.text(st.characters(codec="utf-8"), max_size=12), max_size=80),
    count=st.integers(1, 5),
)
def test_a_piece_of_a_text_gives_the_first_ids_of_the_whole_text(
    words: list[str], count: int
) -> None:
    text = " ".join(words) * 10
    whole = WITHOUT_BOS(text, add_special_tokens=False)["input_ids"]
    assert first_ids(text, WITHOUT_BOS, count) == whole[:count]


def test_a_long_text_is_not_tokenised_whole() -> None:
    seen = []

    def recording(text: str, **options: Any) -> Any:
        seen.append(len(text))
        return WITHOUT_BOS(text, **options)

    text = TEXTS[0] * 10_000
    assert first_ids(text, recording, 3) == WITHOUT_BOS(TEXTS[0])["input_ids"][:3]
    assert sum(seen) < len(text) / 100


def test_without_a_prefix_a_text_begins_with_bos_or_else_eos(spec: GenerateSpec) -> None:
    bare = changed(spec, prefix_tokens=0)
    only_eos = make_tokenizer(with_bos=False, eos_token="</s>")
    neither = make_tokenizer(with_bos=False, pad_token="</s>")
    assert read_prefixes(bare, WITH_BOS) == [[BOS]] * 8
    assert read_prefixes(bare, WITHOUT_BOS) == [[BOS]] * 8
    assert read_prefixes(bare, only_eos) == [[EOS]] * 8
    with pytest.raises(InputError, match=r"prefix_tokens: 0: .*neither BOS nor EOS"):
        read_prefixes(bare, neither)


def test_too_few_texts_are_refused_with_both_counts(spec: GenerateSpec) -> None:
    greater = changed(spec, num_samples=9)
    with pytest.raises(InputError, match="9 texts of at least 3 tokens are needed, 8 were found"):
        read_prefixes(greater, WITH_BOS)


def test_the_endless_testbed_ends_when_its_texts_are_too_short(
    spec: GenerateSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.corpora.TESTBED_TEXTS", 3)
    corpus = TestbedCorpus(mixture={"facts": 1.0})
    endless = changed(spec, prefixes=corpus, prefix_tokens=100_000)
    with pytest.raises(InputError, match="0 were found"):
        read_prefixes(endless, WITH_BOS)


# ------------------------------------------------------------------------------------- generation


RAGGED = [[BOS, 40], [BOS, 50, 60, 70, 80, 90], [BOS], [BOS, 33, 99], [EOS]]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling()], ids=["greedy", "drawn"])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_a_sample_is_the_same_alone_and_in_a_batch(
    request: pytest.FixtureRequest, positions: str, sampling: Sampling
) -> None:
    model = request.getfixturevalue("model" if positions == "rotary" else "gpt2")
    together = generated(model, RAGGED, sampling)
    alone = [generated(model, [ids], sampling, first=n)[0] for n, ids in enumerate(RAGGED)]
    assert together == alone
    assert [sample.prefix_tokens for sample in together] == [2, 6, 1, 3, 1]
    assert all(
        sample.token_ids[: len(ids)] == ids for sample, ids in zip(together, RAGGED, strict=True)
    )
    assert any(len(sample.token_ids) == 24 for sample in together)
    assert all(len(sample.token_ids) <= 24 for sample in together)


ABSOLUTE: dict[str, Any] = {
    "gpt2": GPT2Config(n_positions=24, n_embd=32, n_layer=2, n_head=2),
    "opt": transformers.OPTConfig(
        max_position_embeddings=24,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=32,
    ),
    "gptj": transformers.GPTJConfig(n_positions=24, n_embd=32, n_layer=2, n_head=2, rotary_dim=4),
    "mpt": transformers.MptConfig(max_seq_len=24, d_model=32, n_layers=2, n_heads=2),
}
RECURRENT: dict[str, Any] = {
    "mamba": MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4),
    "recurrent-gemma": transformers.RecurrentGemmaConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        lru_width=32,
        attention_window_size=8,
    ),
}
LONG_ROPE: dict[str, Any] = {
    "long-rope": transformers.Phi3Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=12,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
        },
        pad_token_id=0,
    ),
}


@pytest.mark.parametrize("name", [*ABSOLUTE, *RECURRENT, *LONG_ROPE])
def test_prefixes_of_other_lengths_do_not_change_a_sample_up_to_the_last_position(
    name: str,
) -> None:
    """Padding would use positions that do not exist, enter the state, or move a text across the
    length at which positions switch."""
    config = copy.deepcopy({**ABSOLUTE, **RECURRENT, **LONG_ROPE}[name])
    config.vocab_size, config.bos_token_id, config.eos_token_id = len(WITH_BOS), BOS, EOS
    model = seeded(lambda: transformers.AutoModelForCausalLM.from_config(config))
    for parameter in model.parameters():
        parameter.data.mul_(3)
    together = generated(model, RAGGED, Sampling())
    alone = [generated(model, [ids], Sampling(), first=n)[0] for n, ids in enumerate(RAGGED)]
    assert together == alone
    assert any(len(sample.token_ids) == 24 for sample in together)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling()], ids=["greedy", "drawn"])
@pytest.mark.parametrize(
    ("parameter", "module"),
    [
        ("lm_head.weight", "lm_head"),
        ("model.layers.1.mlp.down_proj.weight", r"model\.layers\.1"),
    ],
)
def test_logits_that_are_nan_are_an_error_that_names_sample_token_and_module(
    model: Any, parameter: str, module: str, sampling: Sampling
) -> None:
    broken = copy.deepcopy(model)
    broken.get_parameter(parameter).data[7] = torch.nan
    place = rf"^sample 3, new token 1: .*NaN or infinite: {module} is the first module"
    with pytest.raises(NonFiniteError, match=place):
        generated(broken, [[BOS, 40]], sampling, first=3)


def test_the_error_for_nan_names_the_sample_that_reads_the_broken_token(model: Any) -> None:
    broken = copy.deepcopy(model)
    broken.get_input_embeddings().weight.data[99] = torch.nan
    place = r"^sample 3, new token 1: .*: model\.embed_tokens is the first module"
    with pytest.raises(NonFiniteError, match=place):
        generated(broken, RAGGED, GREEDY)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused_until_a_text_has_ended(
    model: Any, wrong: float
) -> None:
    check = FiniteLogits(model, sample_ids=range(40, 46), ends=[5], prompt_length=3)
    scores = torch.randn(6, 300, generator=torch.Generator().manual_seed(5))
    texts = torch.zeros(6, 3 + 2, dtype=torch.int64)
    scores[1, 8:20] = -torch.inf  # a model may rule tokens out
    assert check(texts, scores) is scores
    scores[3, 8] = wrong
    with pytest.raises(NonFiniteError, match=r"^sample 43, new token 3: .*NaN or infinite"):
        check(texts, scores)
    texts[3, 3] = 5
    assert check(texts, scores) is scores
    scores[4] = -torch.inf
    with pytest.raises(NonFiniteError, match=r"^sample 44, new token 3: "):
        check(texts, scores)


def test_rows_that_only_pad_the_embeddings_are_never_drawn(model: Any) -> None:
    padded = copy.deepcopy(model)
    padded.resize_token_embeddings(len(WITH_BOS) + 20, mean_resizing=False)
    padded.lm_head.weight.data[len(WITH_BOS) :] = 9 * padded.lm_head.weight.data[40:60]
    for sampling in (GREEDY, Sampling(1.0, 0, 1.0, 1.0)):
        for sample in generated(padded, RAGGED, sampling):
            assert max(sample.token_ids) < len(WITH_BOS)


def test_the_ends_of_the_checkpoint_and_of_the_tokenizer_both_end_a_text(model: Any) -> None:
    settings = GenerationConfig(eos_token_id=[40, 41, 10_000])
    assert end_ids(settings, WITH_BOS) == [40, 41, EOS]
    assert end_ids(GenerationConfig(eos_token_id=EOS), WITH_BOS) == [EOS]
    assert end_ids(GenerationConfig(), WITH_BOS) == [EOS]
    ending = copy.deepcopy(model)
    ending.generation_config.eos_token_id = list(range(2, 60))
    for sample in generated(ending, [[BOS, 99]] * 40, Sampling(2.0, 0, 1.0, 1.0)):
        written = sample.token_ids[2:]
        assert not set(written[:-1]) & {EOS, *range(2, 60)}


def test_greedy_generation_takes_the_likeliest_token_after_the_penalty(model: Any) -> None:
    for sample in generated(model, RAGGED, GREEDY):
        logits = all_logits(model, sample.token_ids)
        for place in range(sample.prefix_tokens, len(sample.token_ids)):
            scores = penalised(logits[place - 1], sample.token_ids[:place], 1.2)
            assert sample.token_ids[place] == scores.argmax()


def test_a_sample_ends_with_its_first_eos(model: Any) -> None:
    endless = copy.deepcopy(model)
    endless.generation_config.eos_token_id = 299
    free = generated(endless, RAGGED, GREEDY)
    end = free[0].token_ids[7]
    ending = copy.deepcopy(model)
    ending.generation_config.eos_token_id = [end, 299]
    for whole, cut in zip(free, generated(ending, RAGGED, GREEDY), strict=True):
        written = whole.token_ids[whole.prefix_tokens :]
        kept = written[: written.index(end) + 1] if end in written else written
        assert cut.token_ids == whole.token_ids[: whole.prefix_tokens] + kept
    assert len({len(sample.token_ids) for sample in generated(ending, RAGGED, GREEDY)}) > 1


def test_a_sample_that_eos_ends_at_once_has_no_generated_token(model: Any) -> None:
    ending = copy.deepcopy(model)
    ending.generation_config.eos_token_id = list(range(300))
    samples = generated(ending, RAGGED, Sampling())
    assert [sample.token_ids for sample in samples] == RAGGED
    scores = score_samples(ending, RAGGED, [sample.prefix_tokens for sample in samples])
    assert all(score.tokens == 0 and score.perplexity is None for score in scores)


def test_no_sample_ends_before_its_minimum_length(model: Any) -> None:
    ending = copy.deepcopy(model)
    ending.generation_config.eos_token_id = list(range(2, 200))
    free = generated(ending, RAGGED, GREEDY)
    assert all(len(sample.token_ids) - sample.prefix_tokens < 5 for sample in free)
    held = generated(ending, RAGGED, GREEDY._replace(min_new_tokens=5))
    for sample in held:
        ids, first = sample.token_ids, sample.prefix_tokens
        assert len(ids) - first > 5 or len(ids) == 24
        logits = all_logits(ending, ids)
        for place in range(first, first + 5):
            scores = penalised(logits[place - 1], ids[:place], 1.2)
            scores[2:200] = -np.inf
            assert ids[place] == scores.argmax()
    with pytest.raises(InputError, match="min_new_tokens: 19: of 24 tokens a prefix already has 6"):
        generated(ending, RAGGED, GREEDY._replace(min_new_tokens=19))


def test_a_sample_that_ends_early_is_drawn_again_and_the_longest_draw_is_kept(model: Any) -> None:
    ending = copy.deepcopy(model)
    ending.generation_config.eos_token_id = list(range(2, 40))
    hot = Sampling(1.5, 0, 1.0, 1.0)
    engine, numbers = TransformersEngine(ending), range(len(RAGGED))

    def drawn(seed: int, redraws: int = 0) -> list[Sample]:
        return generate_samples(
            engine,
            WITH_BOS,
            RAGGED,
            numbers,
            sampling=hot,
            seqlen=24,
            seed=seed,
            redraws=redraws,
        )

    draws = [drawn(3), *(drawn(redraw_seed(3, draw)) for draw in (1, 2, 3))]
    for redraws in (1, 3):
        found = drawn(3, redraws)
        for place, sample in enumerate(found):
            own = [draw[place] for draw in draws[: redraws + 1]]
            assert sample == next(one for one in own if len(one.token_ids) == longest(own))
        assert found != draws[0]
    assert sum(longest([draw[place] for draw in draws]) < 24 for place in numbers) > 0


def longest(samples: list[Sample]) -> int:
    return max(len(sample.token_ids) for sample in samples)


def test_a_sample_that_is_full_is_not_drawn_again(model: Any) -> None:
    class Counting(TransformersEngine):
        rows: ClassVar[list[list[int]]] = []

        def write(self, prefixes: Any, sample_ids: Any, *rest: Any, **named: Any) -> Any:
            self.rows.append(list(sample_ids))
            return super().write(prefixes, sample_ids, *rest, **named)

    ending = copy.deepcopy(model)
    ending.generation_config.eos_token_id = list(range(2, 10))
    engine = Counting(ending)
    hot = Sampling(1.5, 0, 1.0, 1.0)
    samples = generate_samples(
        engine, WITH_BOS, RAGGED, range(5), sampling=hot, seqlen=24, redraws=9
    )
    assert engine.rows[0] == [0, 1, 2, 3, 4]
    assert 2 <= len(engine.rows) <= 10
    for before, after in itertools.pairwise(engine.rows):
        assert set(after) <= set(before)
    assert len(engine.rows) == 10 or all(len(sample.token_ids) == 24 for sample in samples)


def test_later_draws_have_their_own_seeds() -> None:
    seeds = [redraw_seed(seed, draw) for seed in range(20) for draw in range(1, 20)]
    taken = [request_seed(seed, sample) for seed in range(20) for sample in range(50)]
    assert len({*seeds, *taken}) == len(seeds) + len(taken)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("tokens", [None, 4])
def test_the_temperature_goes_to_its_end_in_a_straight_line(tokens: int | None) -> None:
    sampling = Sampling(2.0, 0, 1.0, 1.0, temperature_end=0.5, temperature_tokens=tokens)
    processors = logits_processors(
        sampling,
        torch.zeros(2, 9),
        4,
        known=range(6),
        ends=[],
        seqlen=12,
    )
    schedule = next(each for each in processors if isinstance(each, Temperature))
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 6)))
    for step in range(8):  # the new tokens that fit after the prefix
        found = schedule(torch.zeros(2, 4 + step, dtype=torch.int64), logits.clone())
        share = min(1.0, step / (7 if tokens is None else tokens))
        expected = logits.numpy() / (2.0 + (0.5 - 2.0) * share)
        assert found.numpy() == pytest.approx(expected, rel=1e-6)


def test_every_draw_starts_the_temperature_schedule_again(model: Any) -> None:
    same = Sampling(1.0, temperature_end=1.0)
    assert generated(model, RAGGED, same) == generated(model, RAGGED, Sampling(1.0))
    cold = Sampling(3.0, 0, 1.0, 1.0, temperature_end=1e-3, temperature_tokens=1)
    samples = generated(model, RAGGED, cold)
    for sample in samples:  # after the first draw the likeliest token is taken
        logits = all_logits(model, sample.token_ids)
        for place in range(sample.prefix_tokens + 1, len(sample.token_ids)):
            assert logits[place - 1, sample.token_ids[place]] > logits[place - 1].max() - 1e-2
    firsts = [sample.token_ids[sample.prefix_tokens :][:1] for sample in samples]
    greedy = generated(model, RAGGED, Sampling(0.0, repetition_penalty=1.0))
    assert firsts != [sample.token_ids[sample.prefix_tokens :][:1] for sample in greedy]


def test_drawing_neither_reads_nor_moves_the_global_random_state(model: Any) -> None:
    samples = []
    with torch.random.fork_rng():
        for seed in (1, 2):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            samples.append(generated(model, RAGGED, Sampling()))
            assert torch.equal(torch.get_rng_state(), before)
    assert samples[0] == samples[1]


def test_the_text_is_that_of_the_ids_without_special_tokens(model: Any) -> None:
    prefix = WITH_BOS("the cat")["input_ids"]
    sample = generated(model, [prefix], GREEDY)[0]
    plain = [token for token in sample.token_ids if token not in (BOS, EOS)]
    assert sample.text == WITHOUT_BOS.backend_tokenizer.decode(plain)
    assert sample.text.startswith("the cat")


def test_the_checkpoints_own_generation_settings_are_not_used(model: Any) -> None:
    altered = copy.deepcopy(model)
    altered.generation_config = GenerationConfig(
        eos_token_id=EOS,
        do_sample=True,
        temperature=5.0,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        suppress_tokens=list(range(2, 150)),
        max_length=9,
        num_beams=3,
    )
    own = altered.generation_config
    assert generated(altered, RAGGED, GREEDY) == generated(model, RAGGED, GREEDY)
    assert altered.generation_config is own


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_preallocated_cache_does_not_change_a_bit(
    request: pytest.FixtureRequest, positions: str, dtype: torch.dtype
) -> None:
    fixture = request.getfixturevalue("model" if positions == "rotary" else "gpt2")
    model = copy.deepcopy(fixture).to(dtype)
    preallocated, plain = (
        preallocated_cache(model, 12)["past_key_values"],
        DynamicCache(config=model.config),
    )
    assert {type(layer) for layer in preallocated.layers} == {PreallocatedLayer}
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1, :2] = 0
    length = 0
    for tokens in (4, *[1] * 8):
        ids = torch.randint(0, 300, (3, tokens), generator=generator)
        length += tokens
        found, expected = (
            model(ids, attention_mask=mask[:, :length], past_key_values=cache).logits
            for cache in (preallocated, plain)
        )
        assert torch.equal(found, expected)
    assert preallocated.get_seq_length() == plain.get_seq_length() == 12


def test_a_model_with_windows_or_states_gets_its_own_cache() -> None:
    small = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    for model in (
        MistralForCausalLM(MistralConfig(**small, **heads, sliding_window=4)),
        MambaForCausalLM(MambaConfig(**small, state_size=4)),
    ):
        assert preallocated_cache(model, 24) == {}
        assert len(generated(model.eval(), RAGGED, GREEDY)) == len(RAGGED)


def test_a_prefix_that_fills_the_whole_length_is_refused(model: Any) -> None:
    with pytest.raises(InputError, match="seqlen: 6: a prefix already has 6 tokens"):
        generated(model, RAGGED, GREEDY, seqlen=6)


# --------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(1.0, 0, 1.0, 1.0),
        Sampling(1.5, 8, 1.0, 3.0),
        Sampling(2.0, 0, 0.7, 0.5),
        Sampling(2.0, 12, 0.8, 1.2),
    ],
)
def test_tokens_are_drawn_as_often_as_their_probability_says(
    model: Any, sampling: Sampling
) -> None:
    ids = [BOS, 40, 41, 42, 40]
    expected = 4000 * next_probabilities(all_logits(model, ids)[-1], ids, sampling)
    draws = [
        [*sample.token_ids, EOS][5]  # EOS that comes at once leaves no id
        for first in range(0, 4000, 1000)
        for sample in generated(model, [ids] * 1000, sampling, first, seqlen=6)
    ]
    counts = np.bincount(draws, minlength=len(expected))
    assert not counts[expected == 0].any()
    rare = expected < 5
    pooled = rare.any() and expected[rare].sum() > 0
    observed = np.append(counts[~rare], counts[rare].sum())[: None if pooled else -1]
    awaited = np.append(expected[~rare], expected[rare].sum())[: None if pooled else -1]
    assert len(awaited) > 2
    assert scipy.stats.chisquare(observed, awaited).pvalue > 1e-3


def test_the_penalty_follows_its_formula() -> None:
    scores = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 9))).float()
    texts = [[3, 5, 3], [7, 0, 2]]
    found = RepetitionPenalty(1.5)(torch.tensor(texts), scores.clone())
    for row, text in enumerate(texts):
        expected = penalised(scores[row].double().numpy(), text, 1.5)
        assert found[row].numpy() == pytest.approx(expected, rel=1e-6)


def test_every_step_draws_with_its_own_number() -> None:
    uniforms = torch.tensor([[0.0, 0.3, 0.6], [0.8, 0.1, 0.5]], dtype=torch.float64)
    scores = torch.tensor([[0.25, 0.25, 0.5], [0.7, 0.0, 0.3]]).log()
    draw = Draw(0, 1.0, uniforms, prompt_length=4)
    steps = [draw(torch.zeros(2, 4 + step, dtype=torch.int64), scores.clone()) for step in range(3)]
    assert [step.argmax(dim=1).tolist() for step in steps] == [[0, 2], [1, 0], [2, 0]]
    assert all(int(step.isfinite().sum()) == 2 for step in steps)


def test_every_sample_and_seed_has_its_own_uniform_numbers() -> None:
    rows = uniform_numbers(0, [4, 5, 6], 1000)
    assert torch.equal(uniform_numbers(0, [6], 1000)[0], rows[2])
    assert not np.isin(uniform_numbers(5, [0], 9), np.random.default_rng(5).random(9)).any()
    columns = torch.cat([rows, uniform_numbers(1, [4], 1000)])
    assert all(abs(float(torch.corrcoef(columns)[a, b])) < 0.15 for a in range(4) for b in range(a))
    assert scipy.stats.kstest(columns.flatten().numpy(), "uniform").pvalue > 1e-3


# ------------------------------------------------------------------------------------- the stage


def test_the_size_of_shards_does_not_change_the_texts(spec: GenerateSpec, tmp_path: Path) -> None:
    whole, report = made(spec, tmp_path / "1x8")
    for size in (4, 1):
        parts = changed(spec, shard_size=size)
        assert made(parts, tmp_path / str(size)) == (whole, report)
    assert [row["sample_id"] for row in whole] == list(range(8))
    assert len({row["text"] for row in whole}) == 8
    lengths = [len(row["token_ids"]) for row in whole]
    assert report == {
        "samples": 8,
        "tokens_generated": sum(lengths) - 8 * 4,
        "samples_of_full_length": lengths.count(24),
        "engines": [
            {
                "backend": "transformers",
                "backend_version": transformers.__version__,
                "device": "cpu",
            }
        ],
    }


def test_the_stage_continues_exactly_the_given_number_of_ids(
    spec: GenerateSpec, tmp_path: Path
) -> None:
    rows, _ = made(spec, tmp_path)
    sources = {tuple(WITH_BOS(text)["input_ids"][:4]) for text in TEXTS if len(text) > 1}
    assert {row["prefix_tokens"] for row in rows} == {4}
    assert {tuple(row["token_ids"][:4]) for row in rows} == sources
    assert all(row["token_ids"].count(BOS) >= 1 for row in rows)


def test_another_seed_gives_other_prefixes_in_order_and_other_tokens(
    spec: GenerateSpec, tmp_path: Path
) -> None:
    other = changed(spec, seed=1)
    first, second = made(spec, tmp_path / "0")[0], made(other, tmp_path / "1")[0]
    assert [row["token_ids"][:4] for row in first] != [row["token_ids"][:4] for row in second]
    starts = {tuple(row["token_ids"][:4]): row["token_ids"] for row in first}
    assert any(starts[tuple(row["token_ids"][:4])] != row["token_ids"] for row in second)


def test_the_columns_have_the_types_of_the_schema(spec: GenerateSpec, tmp_path: Path) -> None:
    made(spec, tmp_path)
    schema = pq.read_schema(tmp_path / "joined" / "samples.parquet")
    assert schema.names == ["sample_id", "source", "prefix_tokens", "token_ids", "text"]
    types = [str(field.type).split("<")[0] for field in schema]
    assert types == ["int64", "string", "int32", "list", "string"]
    assert str(schema.field("token_ids").type.value_type) == "int32"


def test_joined_rows_are_sorted_by_sample(spec: GenerateSpec, tmp_path: Path) -> None:
    shards = changed(spec, shard_size=4).shards()
    artifacts = {}
    for shard, numbers in zip(shards, ([3, 0, 7, 5], [6, 1, 4, 2]), strict=True):
        artifacts[shard.key] = tmp_path / shard.key
        artifacts[shard.key].mkdir()
        table = pa.table({"sample_id": numbers, "text": [str(number) for number in numbers]})
        pq.write_table(table, artifacts[shard.key] / "rows.parquet")
    joined = join_shards(shards, artifacts, tmp_path, "rows.parquet")
    assert joined.to_pylist() == [{"sample_id": n, "text": str(n)} for n in range(8)]
    assert pq.read_table(tmp_path / "rows.parquet") == joined


def test_a_worker_reads_the_prefixes_once(
    spec: GenerateSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = itertools.count()
    read = generate.read_prefixes
    monkeypatch.setattr(generate, "read_prefixes", lambda *given: (next(reads), read(*given))[1])
    made(changed(spec, shard_size=2, seed=77), tmp_path)
    assert next(reads) == 1


def test_a_worker_keeps_the_last_model_and_its_tokenizer(spec: GenerateSpec) -> None:
    model, tokenizer = loaded(spec.model, {})
    assert loaded(LocalModel.model_validate(spec.model.model_dump()), {}) == (model, tokenizer)
    other, _ = loaded(spec.model.model_copy(update={"dtype": "bfloat16"}), {})
    assert other.dtype == torch.bfloat16
    assert loaded(spec.model, {})[0] is not model
