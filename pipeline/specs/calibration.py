"""Calibration data: generate, score, filter, windows and describe."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.errors import InputError
from pipeline.specs.base import Fraction, Spec, StageSpec, nearest_stages
from pipeline.specs.engines import VLLM_LOWEST_TEMPERATURE, Backend, Vllm
from pipeline.specs.sources import CorpusMixture, FileCorpus, HubCorpus, Model, TestbedCorpus

MIN_K_FRACTION = 0.2
"""Share of the least likely tokens that Min-K% and Min-K%++ average over. Part of every key of
scores."""

SCORE_BATCH_TOKENS = 8192
"""Tokens of a batch that is scored, padding included. Part of every key of scores."""


class ShardSpec(StageSpec):
    """One part of a stage with independent samples. A lost worker costs one shard at most."""

    version: ClassVar[int] = 1
    kind: Literal["shard"] = "shard"

    of: Annotated["GenerateSpec | ScoreSpec", Field(discriminator="kind")]
    """The stage that it is part of."""

    index: int = Field(ge=0)
    """Its number, from 0."""

    def inputs(self) -> tuple[StageSpec, ...]:
        """The model. For a score also the samples that it scores, and their own model if that is
        another one, because the tokenizers are compared."""
        if isinstance(self.of, ScoreSpec):
            writer = self.of.samples.model
            models = (self.of.model,) if writer == self.of.model else (self.of.model, writer)
            stages = {stage.key: stage for stage in nearest_stages(models)}
            return (self.of.samples_of(self.index), *stages.values())
        return tuple(nearest_stages(self.of))


class ShardedSpec(StageSpec):
    """A stage with independent samples, which is made in shards."""

    @property
    def shard_count(self) -> int:
        """How many parts there are."""
        raise NotImplementedError

    def shards(self) -> tuple[ShardSpec, ...]:
        """The parts in order."""
        return tuple(ShardSpec(of=self, index=index) for index in range(self.shard_count))

    def inputs(self) -> tuple[StageSpec, ...]:
        """The shards, which the stage itself only joins."""
        return self.shards()


class GenerationOptions(Spec):
    """How texts are written: the fields that a grid's calibration and the stage share."""

    num_samples: int = Field(default=5000, ge=1)
    """Texts to write."""

    prefix_tokens: int = Field(default=2, ge=0)
    """Leading tokens of the source text that are given, not counting BOS; 0 starts from BOS alone,
    or from EOS if the tokenizer has no BOS."""

    prompt: Literal["raw", "chat"] = "raw"
    """`raw` continues the prefix itself. `chat` makes it a user's message in the tokenizer's chat
    template, which the model answers; all ids before the answer count as given."""

    top_k: int = Field(default=50, ge=0)
    """Keep the k most likely tokens; 0 keeps all."""

    top_p: float = Field(default=0.95, gt=0.0, le=1.0)
    """Keep the most likely tokens up to this probability mass."""

    temperature: float = Field(default=0.6, ge=0.0)
    """Divides the logits; 0 takes the most likely token."""

    temperature_end: float | None = Field(default=None, gt=0.0)
    """The temperature moves linearly from `temperature` to this value; unset, it stays. Not for
    vLLM."""

    temperature_tokens: int | None = Field(default=None, ge=1)
    """New tokens after which it reaches `temperature_end`; unset, at the sample's last."""

    min_new_tokens: int = Field(default=0, ge=0)
    """New tokens that are drawn before EOS may be."""

    repetition_penalty: float = Field(default=1.2, gt=0.0)
    """Divides positive and multiplies negative logits of tokens that the text already has."""

    redraws: int = Field(default=0, ge=0)
    """At most this many further draws of a sample that EOS ends before `seqlen`, each with its own
    seed. The longest draw is kept, or the first of equally long ones."""

    shard_size: int = Field(default=64, ge=1)
    """Samples of a shard, which are generated together. It is in the spec because a batch's
    composition can change the last bits of a logit: the bytes do not depend on the workers."""

    backend: Backend = "transformers"
    """The engine."""


class GenerateSpec(GenerationOptions, ShardedSpec):
    """Let a model continue short prefixes of real texts.

    Writes `samples.parquet`: sample_id, source (the corpus that the prefix comes from, if there are
    several), prefix_tokens (number of leading ids that were given, BOS included), token_ids (the
    given ones first), text.
    """

    version: ClassVar[int] = 3
    kind: Literal["generate"] = "generate"

    model: Model
    """The generator, usually the dense model that will be pruned."""

    prefixes: Annotated[
        HubCorpus | FileCorpus | TestbedCorpus | CorpusMixture, Field(discriminator="kind")
    ]
    """The texts whose beginnings are the prefixes."""

    seqlen: int = Field(default=2048, ge=8)
    """At most this many tokens a sample, prefix and BOS included; EOS may end it earlier."""

    seed: int = Field(default=0, ge=0)
    """Draws the texts for the prefixes and, with the sample's number, every token."""

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

    @property
    def several_sources(self) -> bool:
        """Whether the samples have the names of several corpora."""
        return isinstance(self.prefixes, CorpusMixture) and self.prefix_tokens > 0


class DrawSpec(StageSpec):
    """Draw samples of real text to choose from: a random stretch of each of `num_samples` texts.

    Writes `samples.parquet` as generate does; no token counts as given, so prefix_tokens is 0. The
    samples are the windows that `WindowsSpec` cuts from the source with `packing: sample`.
    """

    version: ClassVar[int] = 1
    kind: Literal["draw"] = "draw"

    source: Annotated[
        HubCorpus | FileCorpus | TestbedCorpus | CorpusMixture, Field(discriminator="kind")
    ]
    """The texts."""

    model: Model
    """The model to prune, for its tokenizer."""

    num_samples: int = Field(ge=1)
    """Samples to draw."""

    seqlen: int = Field(default=2048, ge=8)
    """Tokens of a sample."""

    seed: int = Field(default=0, ge=0)
    """Draws the texts and the offsets."""

    shard_size: int = Field(default=64, ge=1)
    """Samples that are scored together; in the spec for the same reason as that of generate."""

    @property
    def several_sources(self) -> bool:
        """Whether the samples have the names of several corpora."""
        return isinstance(self.source, CorpusMixture)


class ScoreSpec(ShardedSpec):
    """Score samples under a model.

    Writes `scores.parquet`: sample_id, tokens (how many were scored), perplexity, min_k,
    min_k_plus_plus, loss_1 to loss_4 (mean loss in each quarter), distinct_1 to distinct_3; with
    `hidden_states` also a column of that name (see `pipeline.scoring.mean_states`).
    """

    version: ClassVar[int] = 3
    left_out_at_default: ClassVar[frozenset[str]] = frozenset({"hidden_states"})
    lineage_constants: ClassVar[Mapping[str, Any]] = {
        "min_k_fraction": MIN_K_FRACTION,
        "batch_tokens": SCORE_BATCH_TOKENS,
    }
    kind: Literal["score"] = "score"

    samples: Annotated[GenerateSpec | DrawSpec, Field(discriminator="kind")]
    """The samples to score."""

    model: Model
    """The scorer, usually the samples' own model; another one needs the same vocabulary."""

    include_prefix: bool = False
    """Score the given tokens too, as the paper's script does, not only the generated ones."""

    hidden_states: bool = False
    """Also write each sample's mean hidden states, from the same forward pass. Selectors that
    compare samples by what the model makes of them need these."""

    @property
    def shard_count(self) -> int:
        return math.ceil(self.samples.num_samples / self.samples.shard_size)

    def samples_of(self, index: int) -> StageSpec:
        """Return the stage that has the samples of a shard: drawn ones are one artifact."""
        if isinstance(self.samples, DrawSpec):
            return self.samples
        return ShardSpec(of=self.samples, index=index)


class WordList(Spec):
    """A UTF-8 text file with a word or phrase a line."""

    path: str = Field(min_length=1)
    """The file, on any fsspec file system."""

    fingerprint: str | None = None
    """SHA-256 of the file, filled in when a grid is planned: other words, other key."""


def dropped(samples: int, drop_fraction: float) -> int:
    """Return how many of the samples left by the other reasons `drop_by` drops."""
    return math.floor(drop_fraction * samples + 0.5)


DropBy = Literal["perplexity", "random", "min-k-plus-plus", "zipcal", "cola", "igsp"]
"""Rules that choose samples; `pipeline.scoring.selectors` states each."""

Within = Literal["set", "source", "cluster"]
"""Strata that a rule chooses in."""


class FilterOptions(Spec):
    """Which samples are dropped: the fields that a grid's calibration and the stage share."""

    left_out_at_default: ClassVar[frozenset[str]] = frozenset({"drop_by", "within"})

    drop_fraction: Fraction = 0.0
    """Share that `drop_by` drops, exactly round(fraction * samples). Samples that are dropped for
    other reasons do not count. The paper drops 0.2 by perplexity, which prunes worse on
    the testbed (docs/findings.md, `filter`)."""

    drop_by: DropBy = "perplexity"
    """What decides who is dropped. `perplexity`: the highest go. `random`: a uniform draw, the
    control. `min-k-plus-plus`: the lowest Min-K%++ go, so text nearest to the pretraining text
    stays. `zipcal`: lexical diversity stays. `cola`: one sample for each cluster of hidden states
    stays. `igsp`: samples that repeat the set's 4-grams go, in equal shares over the range of
    perplexity."""

    within: Within = "set"
    """Drop the share of the whole `set`, or the same share of each stratum, so that no kind of text
    is lost: of each `source` (the corpus of the text or prefix), or of each `cluster` of hidden
    states."""

    banned_words: WordList | None = None
    """Words and phrases: a sample with one of them, in any letter case, is dropped."""

    drop_duplicates: bool = False
    """Keep only the first of samples with the same token ids."""

    near_duplicate_similarity: float | None = Field(default=None, ge=0.1, le=1.0)
    """Drop a sample with at least this Jaccard similarity (of the sets of runs of five tokens) to
    an earlier one that is not itself dropped as a duplicate. Unset, no near duplicates are
    dropped."""

    @property
    def draws(self) -> bool:
        """Whether the rule draws at random: the first centroids of clusters are drawn too."""
        return self.drop_by == "random" or self.reads_hidden_states

    @property
    def reads_hidden_states(self) -> bool:
        """Whether the rule compares hidden states."""
        return self.drop_by == "cola" or self.within == "cluster"

    @property
    def reads_scores(self) -> bool:
        """Whether the rule reads any output of the model; the others need no forward pass."""
        return self.reads_hidden_states or self.drop_by not in ("random", "zipcal")


class FilterSpec(FilterOptions, StageSpec):
    """Drop a share of the samples by a rule: the same as choosing the rest.

    Writes `samples.parquet` as generate does, with the scores if the rule reads any, and
    `rejected.parquet`: the dropped samples in the same columns, and reason, the first that applies
    of `invalid` (no token to score), `banned word`, `duplicate`, `near duplicate` and the name of
    the rule.
    """

    version: ClassVar[int] = 4
    left_out_at_default: ClassVar[frozenset[str]] = FilterOptions.left_out_at_default | {"seed"}
    kind: Literal["filter"] = "filter"

    scores: ScoreSpec
    """The scores of the samples to filter. They are made only if the rule reads them."""

    seed: int = Field(default=0, ge=0)
    """For rules that draw at random."""

    @model_validator(mode="after")
    def _rule_has_what_it_reads(self) -> "FilterSpec":
        if self.within == "source" and not self.scores.samples.several_sources:
            raise InputError(
                "within",
                self.within,
                "all samples have one source: mix several corpora, or take within: cluster",
            )
        if self.reads_hidden_states and not self.scores.hidden_states:
            raise InputError("scores.hidden_states", False, "this rule needs them: set it to true")
        return self

    def inputs(self) -> tuple[StageSpec, ...]:
        """The samples, and the scores if the rule reads them."""
        samples = self.scores.samples
        return (self.scores, samples) if self.reads_scores else (samples,)


class WindowsSpec(StageSpec):
    """Cut a calibration set: `nsamples` windows of exactly `seqlen` tokens, without padding.

    Writes `windows.parquet`: window, document, offset, token_ids.
    """

    version: ClassVar[int] = 2
    kind: Literal["windows"] = "windows"

    source: Annotated[
        HubCorpus | FileCorpus | TestbedCorpus | CorpusMixture | GenerateSpec | FilterSpec,
        Field(discriminator="kind"),
    ]
    """A real corpus, several by weight, or samples: those that a model wrote, or a filter kept."""

    model: Model
    """The model to prune, for its tokenizer; samples are not tokenised again."""

    nsamples: int = Field(default=128, ge=1)
    """Windows."""

    seqlen: int = Field(default=2048, ge=8)
    """Tokens of a window."""

    packing: Literal["sample", "concat"] = "sample"
    """`sample`: a window is a random stretch of one text of at least `seqlen` tokens, and each text
    gives at most one window. `concat`: random stretches of all texts joined, which may overlap (the
    paper's way with generated text)."""

    seed: int = Field(default=0, ge=0)
    """Draws the texts and the offsets."""


class DescribeSpec(StageSpec):
    """Score a calibration set, which costs much less than pruning with it.

    Writes `scores.parquet`: window, and the scores and hidden states of `score` over all its tokens
    except the first. The report has each score's mean and standard error over windows, and what the
    set covers as a whole.
    """

    version: ClassVar[int] = 2
    lineage_constants: ClassVar[Mapping[str, Any]] = {"min_k_fraction": MIN_K_FRACTION}
    kind: Literal["describe"] = "describe"

    calibration: WindowsSpec
    """The calibration set."""

    model: Model
    """The scorer: the model to prune, before pruning."""

    reference: WindowsSpec | None = None
    """Text to compare the set with, such as the true pretraining text."""

    @property
    def described_reference(self) -> "DescribeSpec | None":
        """The reference's own description, whose hidden states all sets are compared with."""
        if self.reference is None:
            return None
        return DescribeSpec(calibration=self.reference, model=self.model)

    def inputs(self) -> tuple[StageSpec, ...]:
        """The sets, the model, and the reference's description."""
        described = self.described_reference
        return (*super().inputs(), *([] if described is None else [described]))


def generator_of(source: GenerateSpec | FilterSpec) -> Model:
    """Return the model that wrote the samples, or whose tokenizer drawn ones were cut with."""
    return source.model if isinstance(source, GenerateSpec) else source.scores.samples.model
