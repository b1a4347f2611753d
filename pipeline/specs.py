"""What every stage takes: frozen, validated values whose hash names the artifact they lead to.

All specs stand in this one module because they nest into each other, and because planning a
grid must not wait for torch. A stage's spec holds the specs of the stages before it, so the
lineage of any number is one JSON document.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from pipeline.errors import InputError, did_you_mean

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
"""A share in [0, 1)."""

Mixture = Annotated[dict[str, Annotated[float, Field(gt=0.0, strict=True)]], Field(min_length=1)]
"""Relative weight of each part, all positive; they need not sum to one."""


class Spec(BaseModel):
    """A frozen value that refuses unknown fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    unsaid: ClassVar[frozenset[str]] = frozenset()
    """Fields that no lineage names at their default: they came later, and change nothing then."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_meant(cls, content: Any) -> Any:
        """Name the nearest field to an unknown one, and take no truth value for a number or text:
        YAML reads `no` as one, and pydantic reads that as 0."""
        for name, value in content.items() if isinstance(content, Mapping) else ():
            field = cls.model_fields.get(name)
            if field is None:
                remedy = f"there is no such field; {did_you_mean(str(name), cls.model_fields)}"
                raise InputError(str(name), value, remedy)
            if isinstance(value, bool) and field.annotation not in (bool, Any):
                remedy = (
                    "this field takes neither true nor false, and YAML reads yes, no, on and off "
                    "as these: put a name in quotes"
                )
                raise InputError(name, value, remedy)
        return content


class StageSpec(Spec):
    """The input of one stage. Equal specs lead to one artifact, made once."""

    version: ClassVar[int]
    """Raised when a stage's output changes for the same spec: every later key changes with it."""

    kind: str
    """The stage's name, which also tells the variants of a field apart."""

    @cached_property
    def lineage(self) -> dict[str, Any]:
        """The spec with all it holds, as plain JSON values, stage versions included."""
        return {**_plain_fields(self), "version": self.version}

    @cached_property
    def key(self) -> str:
        """`<kind>-<first 24 hexadecimal digits of the SHA-256 of the canonical JSON>`."""
        return f"{self.kind}-{hashlib.sha256(canonical_json(self.lineage)).hexdigest()[:24]}"

    def inputs(self) -> tuple["StageSpec", ...]:
        """The stages whose artifacts this one reads."""
        return tuple(_nearest_stages(self))

    def rests_on(self) -> tuple["StageSpec", ...]:
        """The stages without whose artifacts this one's own cannot be read."""
        return ()


def without_versions(lineage: Any) -> Any:
    """A lineage as the specs' own fields, which the versions in it are not."""
    if isinstance(lineage, list):
        return [without_versions(item) for item in lineage]
    if not isinstance(lineage, dict):
        return lineage
    fields = {name: without_versions(value) for name, value in lineage.items()}
    if "kind" in lineage and isinstance(lineage.get("version"), int):
        del fields["version"]
        if fields["kind"] == "prune":
            fields.pop("outliers", None)
            fields["pruner"].pop("version", None)
    return fields


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys and no white space: equal values give equal bytes."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def _plain(value: object) -> Any:
    match value:
        case StageSpec():
            return value.lineage
        case Spec():
            return _plain_fields(value)
        case dict():
            return {name: _plain(item) for name, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return value


def _plain_fields(spec: Spec) -> dict[str, Any]:
    said = {
        name: getattr(spec, name)
        for name, field in type(spec).model_fields.items()
        if name not in spec.unsaid or getattr(spec, name) != field.default
    }
    return {name: _plain(value) for name, value in said.items()}


def _nearest_stages(value: object) -> Iterator[StageSpec]:
    if isinstance(value, BaseModel):
        children: list[object] = [getattr(value, name) for name in type(value).model_fields]
    elif isinstance(value, (list, tuple)):
        children = list(value)
    else:
        return
    for child in children:
        if isinstance(child, StageSpec):
            yield child
            yield from child.rests_on()
        else:
            yield from _nearest_stages(child)


# ---------------------------------------------------------------------------- corpora and models


class WorldSpec(Spec):
    """The testbed's small world: its facts, its languages, and how alike its domains open."""

    seed: int = Field(default=0, ge=0)
    """Draws the names and the facts."""

    people: int = Field(default=48, ge=8)
    """How many people the world has; every one has the same number of facts."""

    shared_openings: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the documents, in every domain, that begin with an opening common to all domains:
    0 lets a prefix of two tokens fix the domain, 1 leaves it open."""


class HubCorpus(Spec):
    """A `datasets` builder or a data set on the hub."""

    unsaid: ClassVar[frozenset[str]] = frozenset({"fingerprint"})

    kind: Literal["hub-corpus"] = "hub-corpus"

    path: str = Field(min_length=1)
    """The builder (`json`, `parquet`), the hub name (`allenai/c4`), or a folder with a data set."""

    name: str | None = None
    """The configuration, `en` for C4."""

    data_files: str | tuple[str, ...] | None = None
    """Files of the data set to restrict it to."""

    split: str = "train"
    """The split to read."""

    text_field: str = "text"
    """The column that holds the text."""

    streaming: bool = True
    """Read over the network as needed; otherwise download all of it first."""

    revision: str | None = None
    """A commit of the hub's repository; unset, the key does not change when the hub's data does."""

    fingerprint: str | None = None
    """SHA-256 over the contents of a builder's files or of the folder, filled in when a grid is
    planned: other text, other key. None for a data set on the hub."""


class FileCorpus(Spec):
    """Parquet, JSON Lines or text files, one document a row (a line, in a text file)."""

    kind: Literal["file-corpus"] = "file-corpus"

    path: str = Field(min_length=1)
    """A path or glob, on any fsspec file system; the ending says the format."""

    text_field: str = "text"
    """The column that holds the text; unused for text files."""

    fingerprint: str | None = None
    """SHA-256 over the files' contents, filled in when a grid is planned: other text, other key."""


class TestbedCorpus(Spec):
    """Endless text of the testbed's world."""

    __test__: ClassVar[bool] = False  # the name is no test case's

    kind: Literal["testbed-corpus"] = "testbed-corpus"

    world: WorldSpec = WorldSpec()
    """The world that the text speaks of."""

    mixture: Mixture
    """Weight of each domain, by documents."""

    split: Literal["train", "calibration", "evaluation"] = "calibration"
    """Streams without a document in common; the testbed's model is trained on `train`."""


Corpus = Annotated[HubCorpus | FileCorpus | TestbedCorpus, Field(discriminator="kind")]


class WeightedCorpus(Spec):
    """A corpus and its share of a mixture."""

    corpus: Corpus
    """The text."""

    weight: float = Field(gt=0.0)
    """Relative to the other parts' weights; they need not sum to one."""


class CorpusMixture(Spec):
    """Several corpora that prefixes or windows are taken from in turn, as often as their weights
    say."""

    kind: Literal["corpus-mixture"] = "corpus-mixture"

    parts: dict[str, WeightedCorpus] = Field(min_length=2)
    """Each under the name that the samples' column `source` gives it."""


Dtype = Literal["float32", "bfloat16", "float16"]


class HubModel(Spec):
    """A causal language model on the hub."""

    unsaid: ClassVar[frozenset[str]] = frozenset({"trust_remote_code", "allow_pickle"})

    kind: Literal["hub-model"] = "hub-model"

    name: str = Field(min_length=1)
    """The hub name, `meta-llama/Llama-2-7b-hf`."""

    revision: str = "main"
    """A commit, tag or branch; only a commit keeps a result tied to its weights."""

    dtype: Dtype = "bfloat16"
    """The type of the weights in memory, and of those a pruner leaves."""

    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint, on every node: only if you trust who wrote
    it."""

    allow_pickle: bool = False
    """Load weights that are pickles, where there are no safetensors: loading one may run code."""


class LocalModel(Spec):
    """A checkpoint folder as `save_pretrained` writes it."""

    unsaid: ClassVar[frozenset[str]] = frozenset({"trust_remote_code", "allow_pickle"})

    kind: Literal["local-model"] = "local-model"

    path: str = Field(min_length=1)
    """The folder, with model and tokenizer."""

    dtype: Dtype = "bfloat16"
    """The type of the weights in memory, and of those a pruner leaves."""

    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint, on every node: only if you trust who wrote
    it."""

    allow_pickle: bool = False
    """Load weights that are pickles, where there are no safetensors: loading one may run code."""

    fingerprint: str | None = None
    """Digest of the folder's files, filled in when a grid is planned: other weights, other key."""


class PretrainSpec(StageSpec):
    """Train the testbed's Llama on a known mixture of its world's domains.

    Leaves `model/` (an ordinary checkpoint with its tokenizer) and `training.parquet`.
    """

    version: ClassVar[int] = 1
    kind: Literal["pretrain"] = "pretrain"

    world: WorldSpec = WorldSpec()
    """The world whose text it is trained on."""

    mixture: Mixture
    """Weight of each domain in the training text, by documents."""

    vocab_size: int = Field(default=1024, ge=512)
    """Entries of the byte-level BPE vocabulary, the special ones included."""

    hidden_size: int = Field(default=128, ge=32)
    """Width; a multiple of `head_dim`."""

    intermediate_size: int = Field(default=384, ge=32)
    """Width of the MLP."""

    num_layers: int = Field(default=4, ge=1)
    """Decoder layers."""

    head_dim: int = Field(default=32, ge=32, multiple_of=32)
    """Width of an attention head."""

    num_key_value_heads: int = Field(default=2, ge=1)
    """Heads of keys and values (grouped-query attention)."""

    seqlen: int = Field(default=128, ge=16)
    """Tokens of a training window, and the model's longest input."""

    batch_size: int = Field(default=32, ge=1)
    """Windows of a training step."""

    steps: int = Field(default=700, ge=1)
    """Training steps."""

    learning_rate: float = Field(default=3e-3, gt=0.0)
    """Peak of the learning-rate schedule."""

    seed: int = Field(default=0, ge=0)
    """Draws the initial weights and the order of the text."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "PretrainSpec":
        if self.hidden_size % self.head_dim:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of head_dim {self.head_dim}"
            )
        heads = self.hidden_size // self.head_dim
        if heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide {heads} heads"
            )
        return self


Model = Annotated[
    "HubModel | LocalModel | PretrainSpec | PruneSpec",
    Field(discriminator="kind"),
]
"""Whatever can stand where a model stands; a pruned model can."""


# ------------------------------------------------------------------------------- calibration data


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
            stages = {stage.key: stage for stage in _nearest_stages(models)}
            return (samples, *stages.values())
        return tuple(_nearest_stages(self.of))


class Vllm(Spec):
    """The vLLM engine. All its settings are here, since each can move the last bit of a logit.

    The weights' type is the model's `dtype`; the longest text is `seqlen` where it generates, and
    the longest that the model takes where it answers tasks.
    """

    name: Literal["vllm"] = "vllm"

    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs over which every matrix of a replica is spread."""

    pipeline_parallel_size: int = Field(default=1, ge=1)
    """GPUs, or groups of them, over which a replica's layers are spread."""

    gpu_memory_utilization: float = Field(default=0.9, gt=0.0, le=1.0)
    """Share of a GPU's memory for weights and key-value cache; unused on a CPU, where the cache
    is as large as a shard, or a batch of `batch_tokens`, needs."""

    enable_prefix_caching: bool = False
    """Compute what the prefixes of a shard share only once; of no use with short ones."""

    enforce_eager: bool = False
    """Neither compile the model nor capture CUDA graphs: a quicker start and slower generation."""

    @property
    def gpus(self) -> int:
        """GPUs of a replica, where there are any."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


VLLM_LOWEST_TEMPERATURE = 0.01
"""What vLLM raises a lower temperature to, but for 0."""


def _named_engine(value: object) -> object:
    """`"vllm"` as `{name: vllm}`, and `{name: transformers}` as `"transformers"`."""
    if value == "vllm":
        return {"name": "vllm"}
    return "transformers" if value == {"name": "transformers"} else value


def _engine_tag(value: object) -> str:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", value)
    return f"{name}-engine"


Backend = Annotated[
    Annotated[Literal["transformers"], Tag("transformers-engine")]
    | Annotated[Vllm, Tag("vllm-engine")],
    Discriminator(
        _engine_tag,
        custom_error_type="no_such_backend",
        custom_error_message="there is no such backend; known are transformers and vllm",
    ),
    BeforeValidator(_named_engine),
]
"""The engine that generates or answers. Two engines differ in the last bits of a logit, and so in
the text that they write: it is part of the key."""


class GenerateSpec(StageSpec):
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

    num_samples: int = Field(default=5000, ge=1)
    """Texts to write."""

    prefix_tokens: int = Field(default=2, ge=0)
    """Leading tokens of the source text that are given, BOS not counted; 0 starts from BOS alone,
    or from EOS where there is no BOS."""

    prompt: Literal["raw", "chat"] = "raw"
    """`raw` goes on from the prefix itself. `chat` makes it a user's message in the tokenizer's
    chat template, which the model answers; all ids up to the answer are the given ones."""

    seqlen: int = Field(default=2048, ge=8)
    """Tokens of a sample at the most, prefix and BOS included; EOS may end it earlier."""

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

    seed: int = Field(default=0, ge=0)
    """Draws the texts that prefixes come from and, with the sample's number, every token."""

    shard_size: int = Field(default=64, ge=1)
    """Samples of a shard, generated together. In the spec, since the make-up of a batch can
    move the last bits of a logit: so the bytes do not depend on how many workers there are."""

    backend: Backend = "transformers"
    """The engine."""

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
        """How many parts there are."""
        return math.ceil(self.num_samples / self.shard_size)

    def shards(self) -> tuple[ShardSpec, ...]:
        """The parts in order."""
        return tuple(ShardSpec(of=self, index=index) for index in range(self.shard_count))

    def inputs(self) -> tuple[StageSpec, ...]:
        """The shards: the stage itself only joins them."""
        return self.shards()


class ScoreSpec(StageSpec):
    """Score samples under a model.

    Leaves `scores.parquet`: sample_id, tokens (how many were scored), perplexity, min_k,
    min_k_plus_plus, loss_1 to loss_4 (mean loss in each quarter), distinct_1 to distinct_3.
    """

    version: ClassVar[int] = 3
    kind: Literal["score"] = "score"

    samples: GenerateSpec
    """What is scored."""

    model: Model
    """The scorer, as a rule the generator; another one needs the same vocabulary."""

    include_prefix: bool = False
    """Score the given tokens too, as the paper's script does; else the generated ones only."""

    min_k_fraction: float = Field(default=0.2, gt=0.0, le=1.0)
    """Share of the least likely tokens that Min-K% and Min-K%++ average over."""

    batch_tokens: int = Field(default=8192, ge=1)
    """Tokens of a batch at the most, padding included."""

    @property
    def shard_count(self) -> int:
        """How many parts there are: one for each shard of samples."""
        return self.samples.shard_count

    def shards(self) -> tuple[ShardSpec, ...]:
        """The parts in order."""
        return tuple(ShardSpec(of=self, index=index) for index in range(self.shard_count))

    def inputs(self) -> tuple[StageSpec, ...]:
        """The shards: the stage itself only joins them."""
        return self.shards()


class WordList(Spec):
    """A UTF-8 text file with a word or phrase a line."""

    path: str = Field(min_length=1)
    """The file, on any fsspec file system."""

    fingerprint: str | None = None
    """SHA-256 of the file, filled in when a grid is planned: other words, other key."""


def dropped(samples: int, drop_fraction: float) -> int:
    """How many of the samples with a finite perplexity are dropped for it."""
    return math.floor(drop_fraction * samples + 0.5)


class FilterSpec(StageSpec):
    """Drop the samples of highest perplexity.

    Leaves `samples.parquet` as generate does, with all scores, and `rejected.parquet`: the same
    of the others, and reason (`invalid` for want of a finite perplexity, `banned word`,
    `duplicate`, `near duplicate` or `perplexity`: the first of them that holds).
    """

    version: ClassVar[int] = 4
    kind: Literal["filter"] = "filter"

    scores: ScoreSpec
    """The scores, which name the samples."""

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
    kind: Literal["describe"] = "describe"

    calibration: WindowsSpec
    """The calibration set."""

    model: Model
    """The scorer: the model to be pruned, as it is before pruning."""

    reference: WindowsSpec | None = None
    """Text from which the set's divergence is measured, such as the true pretraining text."""

    min_k_fraction: float = Field(default=0.2, gt=0.0, le=1.0)
    """Share of the least likely tokens that Min-K% and Min-K%++ average over."""


# ---------------------------------------------------------------------------------------- pruning


class PrunerSpec(Spec):
    """The options of a pruner, told apart by its name."""

    version: ClassVar[int] = 1
    """Raised when it prunes otherwise with the same options: only its own prunings, and what
    follows them, have other keys then."""

    calibrated: ClassVar[bool] = True
    """Whether it takes data."""

    updates_weights: ClassVar[bool] = False
    """Whether it changes the weights that it keeps; else masks say all that it does."""

    def check_pattern(self, patterned: bool) -> None:
        """See that the options have a meaning with an N:M pattern, or without one.

        Raises:
            ValueError: if they have none.
        """


class Magnitude(PrunerSpec):
    """Smallest |W| over the whole matrix; takes no data."""

    name: Literal["magnitude"] = "magnitude"
    calibrated: ClassVar[bool] = False


class Wanda(PrunerSpec):
    """Smallest |W| * ||X||_2 in each output row (arXiv 2306.11695)."""

    name: Literal["wanda"] = "wanda"

    variant: bool = False
    """Remove the same share of score mass in each row instead of the same number of weights: rows
    differ, and the matrix's sparsity is met to about 0.001 only. Unstructured."""

    def check_pattern(self, patterned: bool) -> None:
        if self.variant and patterned:
            raise ValueError("wanda's variant has no N:M pattern: leave one of the two out")


class SparseGPT(PrunerSpec):
    """Optimal brain surgeon by column blocks, with weight updates (arXiv 2301.00774)."""

    name: Literal["sparsegpt"] = "sparsegpt"
    version: ClassVar[int] = 2
    updates_weights: ClassVar[bool] = True

    damping: float = Field(default=0.01, gt=0.0)
    """Added to the Hessian's diagonal, as a share of its mean."""

    block_size: int = Field(default=128, ge=1)
    """Columns of a block, in which masks are chosen and updates are held back."""


class DSnoT(PrunerSpec):
    """An initial mask, then swaps of pruned and kept weights that bring the expected error of each
    output to zero (arXiv 2310.08915)."""

    name: Literal["dsnot"] = "dsnot"
    version: ClassVar[int] = 2

    initial: Literal["magnitude", "wanda", "sparsegpt"] = "wanda"
    """Whose score chooses the initial mask, in each row or group; of SparseGPT's the score alone,
    without its updates."""

    scope: Literal["attention", "all"] = "attention"
    """Where weights are swapped; the other matrices keep the initial mask."""

    max_cycles: int = Field(default=50, ge=0)
    """Swaps of a row at the most."""

    update_threshold: float = Field(default=0.1, ge=0.0)
    """A row is left alone once its error, summed over a window's tokens, is no larger."""

    variance_power: float = Field(default=1.0, ge=0.0)
    """Power of the input's variance that divides a pruned weight's claim to come back; 0 leaves
    variances out."""

    variance: Literal["total", "pooled"] = "total"
    """Over all tokens, or, as DSnoT's code has it, within windows only."""

    same_sign: bool = False
    """End a row before the swap that would turn its error's sign; with a pattern always so."""

    keep: Literal["best", "all"] = "best"
    """Of a row's swaps those up to its smallest error, or, as DSnoT's code has it, all."""


class RIA(PrunerSpec):
    """Smallest relative importance and activation over the whole matrix (Zhang et al., ICLR
    2024)."""

    name: Literal["ria"] = "ria"
    version: ClassVar[int] = 2

    activation_power: float = Field(default=0.5, ge=0.0)
    """Power of ||X||_2."""

    permutation: bool = False
    """Let the N:M pattern hold in another order of the columns, in which more score is kept."""

    def check_pattern(self, patterned: bool) -> None:
        if self.permutation and not patterned:
            raise ValueError(
                "ria's permutation serves N:M patterns: set one, or permutation: false"
            )


class ALPS(PrunerSpec):
    """Best mask and weights for the layer's output by ADMM, then conjugate gradients on the mask
    (arXiv 2406.07831)."""

    name: Literal["alps"] = "alps"
    version: ClassVar[int] = 2
    updates_weights: ClassVar[bool] = True

    damping: float = Field(default=0.01, gt=0.0)
    """Added to the Hessian's diagonal, as a share of its mean."""


Pruner = Annotated[Magnitude | Wanda | SparseGPT | DSnoT | RIA | ALPS, Field(discriminator="name")]


class Uniform(Spec):
    """The same sparsity in every decoder layer."""

    name: Literal["uniform"] = "uniform"
    calibrated: ClassVar[bool] = False


class OWL(Spec):
    """Layers with more outliers among their Wanda scores are kept denser (arXiv 2310.05175).

    The defaults are those of its authors for unstructured sparsity.
    """

    name: Literal["owl"] = "owl"
    calibrated: ClassVar[bool] = True

    threshold: float = Field(default=5.0, gt=0.0)
    """M: a score above this many times its layer's mean is an outlier."""

    spread: float = Field(default=0.08, gt=0.0, le=0.5)
    """lambda: the sparsest and the densest layer are 2 * lambda apart. With a pattern N:M little
    comes of it unless 2 * lambda is more than 1/M."""


class ArithmeticProgression(Spec):
    """Every layer is sparser than the one below by the same amount (arXiv 2502.14770)."""

    name: Literal["arithmetic-progression"] = "arithmetic-progression"
    calibrated: ClassVar[bool] = False

    difference: float = Field(gt=0.0, lt=1.0)
    """beta: from one layer to the next. The authors try multiples of 0.002; of L layers of one size
    it can be min(2 S, 2 (1 - S)) / (L - 1) at the most."""


class ByHand(Spec):
    """A sparsity written down for each decoder layer."""

    name: Literal["by-hand"] = "by-hand"
    calibrated: ClassVar[bool] = False

    sparsities: tuple[Fraction, ...] = Field(min_length=1)
    """From the first layer to the last, taken as they are: their mean, weighted by the layers'
    sizes, must be the model's sparsity within 1e-6."""


Allocation = Annotated[Uniform | OWL | ArithmeticProgression | ByHand, Field(discriminator="name")]


class OutliersSpec(StageSpec):
    """Count the outliers in every decoder layer of a model that is not pruned yet.

    Leaves `outliers.parquet`: layer, outlier_ratio, weights (how many the layer's matrices have).
    """

    version: ClassVar[int] = 2
    kind: Literal["outliers"] = "outliers"

    model: Model
    """The model, as it is before pruning."""

    calibration: WindowsSpec
    """The calibration set."""

    threshold: float = Field(gt=0.0)
    """A score above this many times its layer's mean is an outlier."""


_PATTERN = re.compile(r"([1-9]\d*):([1-9]\d*)")


DEVICE_HIDDEN_BYTES = 4 * 2**30
"""Enough for 128 windows of 2,048 tokens of a 70B model in half precision."""

HOST_HIDDEN_BYTES = 16 * 2**30


class PruneSpec(StageSpec):
    """Prune every linear layer in a model's decoder layers, experts too.

    Leaves `sparsity.parquet` (matrix, rows, columns, zeros, sparsity, layer, layer_sparsity and
    layer_pattern, those that the allocation gives its decoder layer), `dense.parquet` (parameter,
    shape, why: all that is not pruned), and the pruned model: if its pruner only chooses what to
    zero, `masks/` for the model that it was made from (`pipeline/models/layer_files.py`); else
    `model/`, a dense checkpoint with zeros, and the tokenizer.
    """

    version: ClassVar[int] = 3
    kind: Literal["prune"] = "prune"

    model: Model
    """The model to prune."""

    pruner: Pruner
    """How weights are chosen and, for some, updated."""

    sparsity: Fraction
    """Share of zeros over all matrices; with a pattern N:M it must be 1 - N/M."""

    pattern: str | None = None
    """`N:M`: N kept of every M adjacent inputs of a row, the hardware's convention; on average, if
    the allocation is not uniform. None is unstructured."""

    allocation: Allocation = Uniform()
    """How the sparsity is spread over decoder layers."""

    calibration: WindowsSpec | None = None
    """The calibration set; None exactly where neither pruner nor allocation takes data."""

    device_hidden_bytes: int = Field(default=DEVICE_HIDDEN_BYTES, ge=0)
    """Bytes of hidden states of the calibration set that are held on the device. It takes
    nsamples * seqlen * hidden size * bytes of the dtype to hold all; the result does not depend
    on it."""

    host_hidden_bytes: int = Field(default=HOST_HIDDEN_BYTES, ge=0)
    """Bytes of hidden states beyond that which are held in host memory; the rest goes to files in
    the system's temporary folder (`TMPDIR`)."""

    checkpoint: bool = False
    """Store an ordinary checkpoint where masks would do."""

    @property
    def stores_masks(self) -> bool:
        """Whether the artifact holds masks, and needs the model that they are for."""
        return not (self.pruner.updates_weights or self.checkpoint)

    def rests_on(self) -> tuple[StageSpec, ...]:
        """The model that masks are for; nothing, of a checkpoint."""
        return tuple(_nearest_stages((self.model,))) if self.stores_masks else ()

    @field_validator("pattern")
    @classmethod
    def _pattern_is_n_of_m(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            parse_pattern(pattern)
        return pattern

    @model_validator(mode="after")
    def _fields_agree(self) -> "PruneSpec":
        if self.pattern is not None:
            kept, group = parse_pattern(self.pattern)
            if not math.isclose(self.sparsity, 1 - kept / group):
                raise ValueError(
                    f"sparsity {self.sparsity} contradicts pattern {self.pattern}: "
                    f"set it to {1 - kept / group:g}"
                )
        self.pruner.check_pattern(self.pattern is not None)
        needs_data = data_taker(self.pruner, self.allocation)
        if needs_data is not None and self.calibration is None:
            raise ValueError(f"{needs_data} needs a calibration set")
        if needs_data is None and self.calibration is not None:
            raise ValueError(f"pruner {self.pruner.name} takes no data: leave calibration out")
        if self.pruner.updates_weights and self.checkpoint:
            raise ValueError(
                f"pruner {self.pruner.name} leaves a checkpoint anyway: leave checkpoint out"
            )
        return self

    @property
    def outliers(self) -> OutliersSpec | None:
        """The stage whose outlier ratios the allocation needs; all prunings of a model that have
        calibration set and threshold in common share it."""
        if not isinstance(self.allocation, OWL) or self.calibration is None:
            return None
        return OutliersSpec(
            model=self.model,
            calibration=self.calibration,
            threshold=self.allocation.threshold,
        )

    @cached_property
    def lineage(self) -> dict[str, Any]:
        """As of any stage, with the version of the pruner above the first, and that of the
        outliers, whose spec these fields give."""
        lineage = super().lineage
        if self.pruner.version > 1:
            lineage["pruner"] = {**lineage["pruner"], "version": self.pruner.version}
        if self.outliers is not None:
            lineage["outliers"] = {"version": self.outliers.version}
        return lineage

    def inputs(self) -> tuple[StageSpec, ...]:
        """The model, the calibration set if the pruner takes data, and the outliers."""
        read = [stage for stage in super().inputs() if stage is not self.calibration]
        if self.pruner.calibrated and self.calibration is not None:
            read.append(self.calibration)
        if self.outliers is not None:
            read.append(self.outliers)
        return tuple(read)


def generator_of(source: GenerateSpec | FilterSpec) -> Model:
    """The model that wrote the texts."""
    return source.model if isinstance(source, GenerateSpec) else source.scores.samples.model


def data_taker(pruner: Pruner, allocation: Allocation) -> str | None:
    """Which of the two needs a calibration set, in words; None if neither does."""
    if pruner.calibrated:
        return f"pruner {pruner.name}"
    return f"allocation {allocation.name}" if allocation.calibrated else None


def parse_pattern(pattern: str) -> tuple[int, int]:
    """`"2:4"` as (2, 4): kept, group size.

    Raises:
        ValueError: if it is no pattern, or keeps more than the group has.
    """
    found = _PATTERN.fullmatch(pattern)
    if found is None:
        raise ValueError(f"pattern {pattern!r} is not of the form N:M, like 2:4")
    kept, group = int(found[1]), int(found[2])
    if kept > group:
        raise ValueError(f"pattern {pattern} keeps {kept} of {group}: N must not exceed M")
    return kept, group


# ------------------------------------------------------------------------------------- evaluation


class PerplexityProtocol(Spec):
    """How a perplexity is taken; every field moves the number."""

    unit: Literal["window", "text"] = "window"
    """`window`: exp of the mean loss over windows of the joined text. `text`: the mean, over texts,
    of each text's own perplexity, of its first `seqlen` tokens."""

    seqlen: int = Field(default=2048, ge=8)
    """Tokens of a window, BOS included; the most that is read of a text."""

    stride: int | None = Field(default=None, ge=1)
    """Tokens from one window's start to the next one's; of a window only what the one before has
    not scored counts. None is `seqlen`, without overlap."""

    bos: Literal["text", "window", "none"] = "text"
    """`text`: special tokens where the tokenizer puts them. `window`: none of those, and BOS (or
    EOS, where there is no BOS) before each window or text, given and not scored. `none`: neither
    of the two."""

    joined_by: str | None = None
    """Joins all texts, blank ones too, before they are tokenised as one. None tokenises each text
    that is not blank, and joins their tokens."""

    texts: int | None = Field(default=None, ge=1)
    """The corpus's first texts that are read; None reads as many as are needed."""

    max_windows: int | None = Field(default=256, ge=1)
    """Windows at the most; None takes all that the texts have."""

    normalisation: Literal["token", "word", "byte"] = "token"
    """What the loss is shared over: tokens, or the words or UTF-8 bytes of the text, so that
    models with different tokenizers compare."""

    @model_validator(mode="after")
    def _fields_agree(self) -> "PerplexityProtocol":
        if self.stride is not None and self.stride > self.longest_text:
            raise ValueError(f"stride {self.stride} leaves tokens out: lower it or raise seqlen")
        if self.unit == "text" and (self.stride or self.joined_by is not None):
            raise ValueError("unit text takes each text by itself: leave stride and joined_by out")
        if self.unit == "text" and self.normalisation != "token":
            raise ValueError("unit text averages over texts: take normalisation: token")
        return self

    @property
    def longest_text(self) -> int:
        """Tokens of a window that are text."""
        return self.seqlen - (self.bos == "window")


class PerplexitySpec(PerplexityProtocol):
    """A perplexity on a corpus."""

    name: str = Field(min_length=1)
    """What the results call it."""

    corpus: Corpus
    """The text, in the corpus's own order."""


class TaskSpec(Spec):
    """One lm-eval task or group."""

    name: str = Field(min_length=1)
    """Its name in lm-eval, or in the task folder."""

    num_fewshot: int = Field(default=0, ge=0)
    """Examples before each question."""

    limit: int | None = Field(default=None, ge=1)
    """Questions at the most, per task; None takes all."""


class TestbedTasksSpec(StageSpec):
    """Write the testbed's multiple-choice tasks as an ordinary lm-eval task folder.

    Leaves one YAML and one JSON Lines file a task.
    """

    __test__: ClassVar[bool] = False  # the name is no test case's

    version: ClassVar[int] = 1
    kind: Literal["testbed-tasks"] = "testbed-tasks"

    world: WorldSpec = WorldSpec()
    """The world whose facts and rules are asked for."""

    questions: int = Field(default=200, ge=1)
    """Questions a task."""


class LocalTasks(Spec):
    """A folder of lm-eval task files."""

    kind: Literal["local-tasks"] = "local-tasks"

    path: str = Field(min_length=1)
    """The folder, as lm-eval's `--include_path` takes it."""

    fingerprint: str | None = None
    """SHA-256 over the folder's files, filled in when a grid is planned."""


class LocalDatasets(Spec):
    """Copies of the hub's data sets: the folder `<folder>/<owner>/<name>` holds the files of the
    data set `<owner>/<name>`."""

    kind: Literal["local-datasets"] = "local-datasets"

    path: str = Field(min_length=1)
    """The folder."""

    fingerprint: str | None = None
    """SHA-256 over the folder's files, filled in when a grid is planned."""


class EvaluateSpec(StageSpec):
    """Measure a model.

    Leaves `metrics.parquet`, a row a number, and `requests.parquet`, a row a number of each
    question or window that it was made of; `docs/results.md` describes both.
    """

    version: ClassVar[int] = 3
    unsaid: ClassVar[frozenset[str]] = frozenset({"backend"})
    kind: Literal["evaluate"] = "evaluate"

    model: Model
    """The model, dense or pruned."""

    perplexity: tuple[PerplexitySpec, ...] = ()
    """Perplexities to take."""

    tasks: tuple[TaskSpec, ...] = ()
    """lm-eval tasks to run."""

    task_folder: Annotated[TestbedTasksSpec | LocalTasks, Field(discriminator="kind")] | None = None
    """Where tasks beyond lm-eval's own are found."""

    datasets: LocalDatasets | None = None
    """Where the tasks' data sets are found; those that are not there come from the hub."""

    chat_template: bool = False
    """Ask tasks in the tokenizer's chat template, examples as turns."""

    batch_tokens: int = Field(default=16384, ge=1)
    """Tokens of a forward pass, padding included, unless one request has more."""

    backend: Backend = "transformers"
    """The engine that answers tasks; perplexities are taken with transformers always."""

    @model_validator(mode="after")
    def _measures_something(self) -> "EvaluateSpec":
        if not self.perplexity and not self.tasks:
            raise ValueError("evaluate needs at least one perplexity or task")
        return self


for _spec in (
    ShardSpec,
    GenerateSpec,
    ScoreSpec,
    FilterSpec,
    WindowsSpec,
    DescribeSpec,
    OutliersSpec,
    PruneSpec,
    EvaluateSpec,
):
    _spec.model_rebuild()
