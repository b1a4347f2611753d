"""Calibration data: generate, score, filter, windows, and what a set is like."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.specs.base import Fraction, Spec, StageSpec, nearest_stages
from pipeline.specs.engines import VLLM_LOWEST_TEMPERATURE, Backend, Vllm
from pipeline.specs.sources import CorpusMixture, FileCorpus, HubCorpus, Model, TestbedCorpus

MIN_K_FRACTION = 0.2
"""Share of the least likely tokens that Min-K% and Min-K%++ average over. Part of every key of
scores."""

SCORE_BATCH_TOKENS = 8192
"""Tokens of a batch that is scored, padding included. Part of every key of scores."""


class ShardSpec(StageSpec):
    """One part of a stage whose samples are independent: the most that a lost worker costs."""

    version: ClassVar[int] = 1
    kind: Literal["shard"] = "shard"

    of: Annotated["GenerateSpec | ScoreSpec", Field(discriminator="kind")]
    """The stage it is a part of."""

    index: int = Field(ge=0)
    """Its number, from 0."""

    def inputs(self) -> tuple[StageSpec, ...]:
        """The model, and for a score just the one shard of samples that it scores, with the
        generator if that is another model: its tokenizer is compared."""
        if isinstance(self.of, ScoreSpec):
            generator = self.of.samples.model
            samples = ShardSpec(of=self.of.samples, index=self.index)
            models = (self.of.model,) if generator == self.of.model else (self.of.model, generator)
            stages = {stage.key: stage for stage in nearest_stages(models)}
            return (samples, *stages.values())
        return tuple(nearest_stages(self.of))


class ShardedSpec(StageSpec):
    """A stage whose samples are independent."""

    @property
    def shard_count(self) -> int:
        """How many parts there are."""
        raise NotImplementedError

    def shards(self) -> tuple[ShardSpec, ...]:
        """The parts in order."""
        return tuple(ShardSpec(of=self, index=index) for index in range(self.shard_count))

    def inputs(self) -> tuple[StageSpec, ...]:
        """The shards: the stage itself only joins them."""
        return self.shards()


class GenerationOptions(Spec):
    """How texts are written: what a grid says of it and the stage has."""

    num_samples: int = Field(default=5000, ge=1)
    """Texts to write."""

    prefix_tokens: int = Field(default=2, ge=0)
    """Leading tokens of the source text that are given, BOS not counted; 0 starts from BOS alone,
    or from EOS where there is no BOS."""

    prompt: Literal["raw", "chat"] = "raw"
    """`raw` goes on from the prefix itself. `chat` makes it a user's message in the tokenizer's
    chat template, which the model answers; all ids up to the answer are the given ones."""

    top_k: int = Field(default=50, ge=0)
    """Keep the k likeliest tokens; 0 keeps all."""

    top_p: float = Field(default=0.95, gt=0.0, le=1.0)
    """Keep the likeliest tokens up to this probability mass."""

    temperature: float = Field(default=0.6, ge=0.0)
    """Divides the logits; 0 takes the likeliest token."""

    temperature_end: float | None = Field(default=None, gt=0.0)
    """Where the temperature goes from `temperature` in a straight line; unset, it stays. Not with
    vLLM."""

    temperature_tokens: int | None = Field(default=None, ge=1)
    """New tokens after which it is at `temperature_end`; unset, with the sample's last."""

    min_new_tokens: int = Field(default=0, ge=0)
    """New tokens before which EOS is not drawn."""

    repetition_penalty: float = Field(default=1.2, gt=0.0)
    """Divides (multiplies, if negative) the logits of tokens that are already there."""

    redraws: int = Field(default=0, ge=0)
    """How often, at the most, a sample that EOS ends before `seqlen` is drawn again, each time with
    a seed of its own. The longest draw is kept, of equal ones the first."""

    shard_size: int = Field(default=64, ge=1)
    """Samples of a shard, generated together. In the spec, since the make-up of a batch can
    move the last bits of a logit: so the bytes do not depend on how many workers there are."""

    backend: Backend = "transformers"
    """The engine."""


class GenerateSpec(GenerationOptions, ShardedSpec):
    """Let a model go on from short prefixes of real texts.

    Leaves `samples.parquet`: sample_id, source (of a mixture, the name of the corpus that the
    prefix is from), prefix_tokens (how many leading ids were given and not generated, BOS
    included), token_ids (those first), text.
    """

    version: ClassVar[int] = 3
    kind: Literal["generate"] = "generate"

    model: Model
    """The generator, as a rule the dense model that is to be pruned."""

    prefixes: Annotated[
        HubCorpus | FileCorpus | TestbedCorpus | CorpusMixture, Field(discriminator="kind")
    ]
    """Where the prefixes are cut from, one a text."""

    seqlen: int = Field(default=2048, ge=8)
    """Tokens of a sample at the most, prefix and BOS included; EOS may end it earlier."""

    seed: int = Field(default=0, ge=0)
    """Draws the texts that prefixes come from and, with the sample's number, every token."""

    @model_validator(mode="after")
    def _engine_takes_the_temperature(self) -> "GenerateSpec":
        low = 0 < self.temperature < VLLM_LOWEST_TEMPERATURE
        if low and isinstance(self.backend, Vllm):
            raise ValueError(
                f"vLLM takes no temperature between 0 and {VLLM_LOWEST_TEMPERATURE}, "
                f"and {self.temperature} is: raise it, set it to 0, or take backend: transformers"
            )
        return self

    @model_validator(mode="after")
    def _prompt_has_a_message(self) -> "GenerateSpec":
        if self.prompt == "chat" and self.prefix_tokens == 0:
            raise ValueError("prompt: chat needs a message: raise prefix_tokens, or take raw")
        return self

    @model_validator(mode="after")
    def _another_draw_differs(self) -> "GenerateSpec":
        if self.redraws and self.temperature == 0:
            raise ValueError(
                "redraws at temperature 0 give the same text again: raise temperature, or leave "
                "them out"
            )
        return self

    @model_validator(mode="after")
    def _least_length_fits(self) -> "GenerateSpec":
        if self.min_new_tokens and self.prefix_tokens + self.min_new_tokens > self.seqlen:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} after prefix_tokens {self.prefix_tokens} "
                f"are more than seqlen {self.seqlen}: lower one of them or raise seqlen"
            )
        return self

    @model_validator(mode="after")
    def _temperature_can_go_to_its_end(self) -> "GenerateSpec":
        if self.temperature_end is None:
            if self.temperature_tokens is not None:
                raise ValueError("temperature_tokens needs a temperature_end: set it too")
            return self
        if self.temperature == 0:
            raise ValueError("temperature_end needs a temperature above 0: raise it")
        if isinstance(self.backend, Vllm):
            raise ValueError(
                "vLLM keeps one temperature for all of a sample: leave temperature_end out, or "
                "take backend: transformers"
            )
        return self

    @property
    def shard_count(self) -> int:
        return math.ceil(self.num_samples / self.shard_size)


class ScoreSpec(ShardedSpec):
    """Score samples under a model.

    Leaves `scores.parquet`: sample_id, tokens (how many were scored), perplexity, min_k,
    min_k_plus_plus, loss_1 to loss_4 (mean loss in each quarter), distinct_1 to distinct_3.
    """

    version: ClassVar[int] = 3
    lineage_constants: ClassVar[Mapping[str, Any]] = {
        "min_k_fraction": MIN_K_FRACTION,
        "batch_tokens": SCORE_BATCH_TOKENS,
    }
    kind: Literal["score"] = "score"

    samples: GenerateSpec
    """What is scored."""

    model: Model
    """The scorer, as a rule the generator; another one needs the same vocabulary."""

    include_prefix: bool = False
    """Score the given tokens too, as the paper's script does; else the generated ones only."""

    @property
    def shard_count(self) -> int:
        return self.samples.shard_count  # one for each shard of samples


class WordList(Spec):
    """A UTF-8 text file with a word or phrase a line."""

    path: str = Field(min_length=1)
    """The file, on any fsspec file system."""

    fingerprint: str | None = None
    """SHA-256 of the file, filled in when a grid is planned: other words, other key."""


def dropped(samples: int, drop_fraction: float) -> int:
    """How many of the samples with a finite perplexity are dropped for it."""
    return math.floor(drop_fraction * samples + 0.5)


class FilterOptions(Spec):
    """Which samples are dropped: what a grid says of it and the stage has."""

    drop_fraction: Fraction = 0.2
    """Share to drop: exactly round(fraction * samples) go, besides those that go for another
    reason."""

    banned_words: WordList | None = None
    """Words and phrases, of which a sample must hold none, in whatever letter case."""

    drop_duplicates: bool = False
    """Of samples with the same token ids keep only the first."""

    near_duplicate_similarity: float | None = Field(default=None, ge=0.1, le=1.0)
    """Drop a sample that has at least this Jaccard similarity, of sets of runs of five tokens, with
    an earlier one that is not dropped as a duplicate itself. Unset, none is looked for."""


class FilterSpec(FilterOptions, StageSpec):
    """Drop the samples of highest perplexity.

    Leaves `samples.parquet` as generate does, with all scores, and `rejected.parquet`: the same
    of the others, and reason (`invalid` for want of a finite perplexity, `banned word`,
    `duplicate`, `near duplicate` or `perplexity`: the first of them that holds).
    """

    version: ClassVar[int] = 4
    kind: Literal["filter"] = "filter"

    scores: ScoreSpec
    """The scores, which name the samples."""

    def inputs(self) -> tuple[StageSpec, ...]:
        """The scores and the samples they belong to."""
        return (self.scores, self.scores.samples)


class WindowsSpec(StageSpec):
    """Cut a calibration set: `nsamples` windows of exactly `seqlen` tokens, without padding.

    Leaves `windows.parquet`: window, document, offset, token_ids.
    """

    version: ClassVar[int] = 2
    kind: Literal["windows"] = "windows"

    source: Annotated[
        HubCorpus | FileCorpus | TestbedCorpus | CorpusMixture | GenerateSpec | FilterSpec,
        Field(discriminator="kind"),
    ]
    """A real corpus, several of them by weight, or samples that a model wrote."""

    model: Model
    """The model to be pruned, for its tokenizer; samples are not tokenised again."""

    nsamples: int = Field(default=128, ge=1)
    """Windows."""

    seqlen: int = Field(default=2048, ge=8)
    """Tokens of a window."""

    packing: Literal["sample", "concat"] = "sample"
    """`sample`: a window is a random stretch of one text of at least `seqlen` tokens, each text
    used once at most. `concat`: random stretches of all texts joined (the paper's way with
    generated text), which may overlap."""

    seed: int = Field(default=0, ge=0)
    """Draws the texts and the offsets."""


class DescribeSpec(StageSpec):
    """Say what a calibration set is like, for much less than pruning with it costs.

    Leaves `scores.parquet`: window, and the scores of `score` over all its tokens but the first.
    The report has the mean of each and its standard error over windows.
    """

    version: ClassVar[int] = 1
    lineage_constants: ClassVar[Mapping[str, Any]] = {"min_k_fraction": MIN_K_FRACTION}
    kind: Literal["describe"] = "describe"

    calibration: WindowsSpec
    """The calibration set."""

    model: Model
    """The scorer: the model to be pruned, as it is before pruning."""

    reference: WindowsSpec | None = None
    """Text from which the set's divergence is measured, such as the true pretraining text."""


def generator_of(source: GenerateSpec | FilterSpec) -> Model:
    """The model that wrote the texts."""
    return source.model if isinstance(source, GenerateSpec) else source.scores.samples.model
