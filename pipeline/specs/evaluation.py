"""What is measured of a model, and by which protocol."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.specs.base import Spec, StageSpec
from pipeline.specs.engines import Backend
from pipeline.specs.sources import Corpus, Model, WorldSpec


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


class EvaluationOptions(Spec):
    """How a model is measured: what a grid says of it and the stage has."""

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


class EvaluateSpec(EvaluationOptions, StageSpec):
    """Measure a model.

    Leaves `metrics.parquet`, a row a number, and `requests.parquet`, a row a number of each
    question or window that it was made of; `docs/results.md` describes both.
    """

    version: ClassVar[int] = 3
    left_out_at_default: ClassVar[frozenset[str]] = frozenset({"backend"})
    kind: Literal["evaluate"] = "evaluate"

    model: Model
    """The model, dense or pruned."""

    perplexity: tuple[PerplexitySpec, ...] = ()
    """Perplexities to take."""

    tasks: tuple[TaskSpec, ...] = ()
    """lm-eval tasks to run."""

    @model_validator(mode="after")
    def _measures_something(self) -> "EvaluateSpec":
        if not self.perplexity and not self.tasks:
            raise ValueError("evaluate needs at least one perplexity or task")
        return self
