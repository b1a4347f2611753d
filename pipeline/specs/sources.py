"""Corpora and models."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.specs.base import Mixture, Spec, StageSpec

if TYPE_CHECKING:
    from pipeline.specs.pruning import PruneSpec


class WorldSpec(Spec):
    """The testbed's small world: its facts, its languages, and how similar its domains open."""

    seed: int = Field(default=0, ge=0)
    """Draws the names and the facts."""

    people: int = Field(default=48, ge=8)
    """People in the world, each with the same number of facts."""

    shared_openings: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of documents, in every domain, that begin with an opening common to all domains: at 0 a
    prefix of two tokens fixes the domain, at 1 it leaves it open."""


class HubCorpus(Spec):
    """A `datasets` builder or a data set on the hub."""

    left_out_at_default: ClassVar[frozenset[str]] = frozenset({"fingerprint"})

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
    """Read over the network as needed, instead of downloading everything first."""

    revision: str | None = None
    """A commit of the hub's repository. If unset, the key stays the same when the hub's data
    change."""

    fingerprint: str | None = None
    """SHA-256 of the builder's files or the folder, filled in when a grid is planned: other text,
    other key. None for a data set on the hub."""


class FileCorpus(Spec):
    """Parquet, JSON Lines or text files with a document in each row or line."""

    kind: Literal["file-corpus"] = "file-corpus"

    path: str = Field(min_length=1)
    """A path or glob on any fsspec file system; the file ending gives the format."""

    text_field: str = "text"
    """The column that holds the text; unused for text files."""

    fingerprint: str | None = None
    """SHA-256 of the files, filled in when a grid is planned: other text, other key."""


class TestbedCorpus(Spec):
    """Endless text of the testbed's world."""

    __test__: ClassVar[bool] = False  # pytest takes it for a test case otherwise

    kind: Literal["testbed-corpus"] = "testbed-corpus"

    world: WorldSpec = WorldSpec()
    """The world that the text is about."""

    mixture: Mixture
    """Weight of each domain, by documents."""

    split: Literal["train", "calibration", "evaluation"] = "calibration"
    """Disjoint streams of documents; the testbed's model is trained on `train`."""


Corpus = Annotated[HubCorpus | FileCorpus | TestbedCorpus, Field(discriminator="kind")]


class WeightedCorpus(Spec):
    """A corpus and its share of a mixture."""

    corpus: Corpus
    """The text."""

    weight: float = Field(gt=0.0)
    """Relative to the other parts; any sum."""


class CorpusMixture(Spec):
    """Several corpora, from which prefixes or windows are taken in turn, in proportion to their
    weights."""

    kind: Literal["corpus-mixture"] = "corpus-mixture"

    parts: dict[str, WeightedCorpus] = Field(min_length=2)
    """By the name that the samples' column `source` gives each."""


Dtype = Literal["float32", "bfloat16", "float16"]


class HubModel(Spec):
    """A causal language model on the hub."""

    left_out_at_default: ClassVar[frozenset[str]] = frozenset({"trust_remote_code", "allow_pickle"})

    kind: Literal["hub-model"] = "hub-model"

    name: str = Field(min_length=1)
    """The hub name, `meta-llama/Llama-2-7b-hf`."""

    revision: str = "main"
    """A commit, tag or branch; only a commit ties a result to its weights."""

    dtype: Dtype = "bfloat16"
    """The type of the weights in memory, and of those that a pruner stores."""

    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint, on every node: only if you trust its
    author."""

    allow_pickle: bool = False
    """Load pickled weights if there are no safetensors: loading a pickle may run code."""


class LocalModel(Spec):
    """A checkpoint folder as `save_pretrained` writes it."""

    left_out_at_default: ClassVar[frozenset[str]] = frozenset({"trust_remote_code", "allow_pickle"})

    kind: Literal["local-model"] = "local-model"

    path: str = Field(min_length=1)
    """The folder, with model and tokenizer."""

    dtype: Dtype = "bfloat16"
    """The type of the weights in memory, and of those that a pruner stores."""

    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint, on every node: only if you trust its
    author."""

    allow_pickle: bool = False
    """Load pickled weights if there are no safetensors: loading a pickle may run code."""

    fingerprint: str | None = None
    """Digest of the folder's files, filled in when a grid is planned: other weights, other key."""


class PretrainSpec(StageSpec):
    """Train the testbed's Llama on a known mixture of domains.

    Leaves `model/` (an ordinary checkpoint with its tokenizer) and `training.parquet`.
    """

    version: ClassVar[int] = 1
    kind: Literal["pretrain"] = "pretrain"

    world: WorldSpec = WorldSpec()
    """The world that the training text is about."""

    mixture: Mixture
    """Weight of each domain in the training text, by documents."""

    vocab_size: int = Field(default=1024, ge=512)
    """Entries of the byte-level BPE vocabulary, special ones included."""

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

    dtype: ClassVar[str] = "float32"
    """Type of the weights."""

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
"""Anything that serves as a model, pruned models included."""
