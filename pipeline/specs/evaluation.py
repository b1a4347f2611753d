"""Measurements of a model and their protocols."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.specs.base import Spec, StageSpec, nearest_stages
from pipeline.specs.engines import Backend
from pipeline.specs.pruning import PruneSpec
from pipeline.specs.sources import Corpus, Model, WorldSpec


class PerplexityProtocol(Spec):
    """How a perplexity is measured; every field but `kl` changes the number."""

    left_out_at_default: ClassVar[frozenset[str]] = frozenset({"kl"})

    unit: Literal["window", "text"] = "window"
    """`window`: exp of the mean loss over windows of the joined text. `text`: the mean over texts
    of the perplexity of each text's first `seqlen` tokens."""

    seqlen: int = Field(default=2048, ge=8)
    """Tokens of a window, or at most of a text, BOS included."""

    stride: int | None = Field(default=None, ge=1)
    """Tokens from one window's start to the next one's. Only tokens that the window before has not
    scored count. None is `seqlen`: no overlap."""

    bos: Literal["text", "window", "none"] = "text"
    """`text`: special tokens where the tokenizer puts them. `window`: none of those, but BOS (EOS
    if the tokenizer has no BOS) before each window or text, given and not scored. `none`:
    neither."""

    joined_by: str | None = None
    """Join all texts with this, blank ones too, and tokenise them as one. None tokenises each text
    that is not blank and joins their tokens."""

    texts: int | None = Field(default=None, ge=1)
    """Read only this many texts from the corpus's start; None reads as many as are needed."""

    max_windows: int | None = Field(default=256, ge=1)
    """At most this many windows; None takes all that the texts have."""

    normalisation: Literal["token", "word", "byte"] = "token"
    """What the loss is averaged over: tokens, or the words or UTF-8 bytes of the text, so that
    models with different tokenizers compare."""

    kl: bool = False
    """Also compare a pruned model with its dense one on the scored tokens: KL divergence, and how
    often the most likely token is another one. Costs a forward pass of the dense model."""

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
        """Tokens of text in a window."""
        return self.seqlen - (self.bos == "window")


class PerplexitySpec(PerplexityProtocol):
    """A perplexity on a corpus."""

    name: str = Field(min_length=1)
    """Its name in the results."""

    corpus: Corpus
    """The text, in the corpus's own order."""


class TaskSpec(Spec):
    """One lm-eval task or group."""

    name: str = Field(min_length=1)
    """Its name in lm-eval, or in the task folder."""

    num_fewshot: int = Field(default=0, ge=0)
    """Examples before each question."""

    limit: int | None = Field(default=None, ge=1)
    """At most this many questions per task; None takes all."""


class TestbedTasksSpec(StageSpec):
    """Write the testbed's multiple-choice tasks as an ordinary lm-eval task folder.

    Writes one YAML and one JSON Lines file for each task.
    """

    __test__: ClassVar[bool] = False  # pytest takes it for a test case otherwise

    version: ClassVar[int] = 1
    kind: Literal["testbed-tasks"] = "testbed-tasks"

    world: WorldSpec = WorldSpec()
    """The world that the questions are about."""

    questions: int = Field(default=200, ge=1)
    """Questions per task."""


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


class EvaluationOptions(Spec):
    """How a model is measured: the fields that a grid's evaluation and the stage share."""

    task_folder: Annotated[TestbedTasksSpec | LocalTasks, Field(discriminator="kind")] | None = None
    """Tasks besides lm-eval's own."""

    datasets: LocalDatasets | None = None
    """Local copies of the tasks' data sets; those without a copy come from the hub."""

    chat_template: bool = False
    """Ask tasks in the tokenizer's chat template, with examples as turns."""

    batch_tokens: int = Field(default=16384, ge=1)
    """Tokens of a forward pass, padding included; a longer request has a pass to itself."""

    backend: Backend = "transformers"
    """The engine that answers tasks; perplexities always use transformers."""


class EvaluateSpec(EvaluationOptions, StageSpec):
    """Measure a model.

    Writes `metrics.parquet`, a row for each number, and `requests.parquet`, a row for each number
    of each question or window behind it; `docs/results.md` describes both.
    """

    version: ClassVar[int] = 3
    left_out_at_default: ClassVar[frozenset[str]] = frozenset({"backend"})
    kind: Literal["evaluate"] = "evaluate"

    model: Model
    """The model, dense or pruned."""

    perplexity: tuple[PerplexitySpec, ...] = ()
    """Perplexities to measure."""

    tasks: tuple[TaskSpec, ...] = ()
    """lm-eval tasks to run."""

    @model_validator(mode="after")
    def _measures_something(self) -> "EvaluateSpec":
        if not self.perplexity and not self.tasks:
            raise ValueError("evaluate needs at least one perplexity or task")
        return self

    @model_validator(mode="after")
    def _has_a_dense_model(self) -> "EvaluateSpec":
        if self.compares and not isinstance(self.model, PruneSpec):
            raise ValueError("kl compares a pruned model with its dense one: leave kl out")
        return self

    @property
    def compares(self) -> bool:
        """Whether the dense model is needed too."""
        return any(entry.kl for entry in self.perplexity)

    def inputs(self) -> tuple[StageSpec, ...]:
        """As of any stage, and the dense model if the two are compared."""
        stages = super().inputs()
        if self.compares:
            stages += tuple(nearest_stages((dense_model(self.model),)))
        return tuple({stage.key: stage for stage in stages}.values())


def dense_model(model: Model) -> Model:
    """Return the model that a pruned one was made from, before any pruning."""
    while isinstance(model, PruneSpec):
        model = model.model
    return model
