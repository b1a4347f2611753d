"""Grid files: what a person writes."""

import difflib
import importlib.util
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from cluster.graph import Resources
from pipeline.corpora import fingerprint
from pipeline.errors import InputError
from pipeline.presets import CORPUS_PRESETS
from pipeline.specs import (
    Backend,
    Corpus,
    FileCorpus,
    Fraction,
    HubModel,
    LocalModel,
    LocalTasks,
    PretrainSpec,
    Spec,
    TaskSpec,
    TestbedTasksSpec,
)
from pipeline.testbed.presets import PRETRAIN_PRESETS


def _from_preset(presets: Mapping[str, BaseModel], value: object) -> object:
    """A preset's name, or `{preset: NAME, field: value}`, as the fields that it stands for."""
    entry = {"preset": value} if isinstance(value, str) else value
    if not isinstance(entry, Mapping) or "preset" not in entry:
        return entry
    name = entry["preset"]
    if name not in presets:
        raise ValueError(f"there is no preset {name!r}; {suggestion(str(name), presets)}")
    return {
        **presets[name].model_dump(),
        **{field: item for field, item in entry.items() if field != "preset"},
    }


_MODELS: dict[str, BaseModel] = {f"testbed-{size}": spec for size, spec in PRETRAIN_PRESETS.items()}

GridCorpus = Annotated[Corpus, BeforeValidator(lambda value: _from_preset(CORPUS_PRESETS, value))]
GridModel = Annotated[
    Annotated[HubModel | LocalModel | PretrainSpec, Field(discriminator="kind")],
    BeforeValidator(lambda value: _from_preset(_MODELS, value)),
]


def named(value: object) -> object:
    """`"wanda"` as `{name: wanda}`: a name alone stands for all defaults."""
    return {"name": value} if isinstance(value, str) else value


def _here(value: object) -> object:
    """`auto` as the engine that is installed where the grid is read."""
    if value != "auto":
        return value
    return "vllm" if importlib.util.find_spec("vllm") else "transformers"


class CorpusCalibration(Spec):
    """Windows cut straight from a corpus."""

    corpus: str
    """Name of one of the grid's corpora."""

    packing: Literal["sample", "concat"] = "sample"
    """How windows are cut."""


class GeneratedCalibration(Spec):
    """Text that a model writes from prefixes of a corpus, filtered by perplexity."""

    prefixes: str
    """Name of the grid's corpus that prefixes are cut from."""

    generator: str | None = None
    """Name of the grid's model that writes; the model to be pruned if unset."""

    num_samples: int = Field(default=5000, ge=1)
    prefix_tokens: int = Field(default=2, ge=0)
    top_k: int = Field(default=50, ge=0)
    top_p: float = Field(default=0.95, gt=0.0, le=1.0)
    temperature: float = Field(default=0.6, ge=0.0)
    temperature_end: float | None = Field(default=None, gt=0.0)
    temperature_tokens: int | None = Field(default=None, ge=1)
    min_new_tokens: int = Field(default=0, ge=0)
    repetition_penalty: float = Field(default=1.2, gt=0.0)
    shard_size: int = Field(default=64, ge=1)

    backend: Annotated[Backend, BeforeValidator(_here)] = "transformers"
    """`transformers`, `vllm`, `{name: vllm, tensor_parallel_size: 2, ...}`, or `auto`: vLLM if that
    is installed where the grid is read, else transformers. Keys hold the engine, never `auto`."""

    generation_seed: int | None = Field(default=None, ge=0)
    """One set of texts for all seeds, which then draw the windows only; each seed has its own set
    if unset."""

    drop_fraction: Fraction = 0.2
    """Share of the samples with the highest perplexity that is dropped; 0 drops only those that
    have no finite score."""

    drop_duplicates: bool = False
    """Whether only the first of samples with the same token ids is kept."""

    scorer: str | None = None
    """Name of the grid's model by whose perplexity samples are dropped; the one that writes if
    unset. Both must have the same tokenizer."""

    include_prefix: bool = False
    """Whether the given tokens count in the perplexity."""

    packing: Literal["sample", "concat"] = "concat"
    """How windows are cut."""


def _calibration_tag(value: object) -> str | None:
    if not isinstance(value, Mapping):
        return type(value).__name__
    if "corpus" in value:
        return CorpusCalibration.__name__
    return GeneratedCalibration.__name__ if "prefixes" in value else None


GridCalibration = Annotated[
    Annotated[CorpusCalibration, Tag(CorpusCalibration.__name__)]
    | Annotated[GeneratedCalibration, Tag(GeneratedCalibration.__name__)],
    Discriminator(
        _calibration_tag,
        custom_error_type="no_source",
        custom_error_message="give corpus for real text, or prefixes for text that a model writes",
    ),
]


class GridPerplexity(Spec):
    """A perplexity on one of the grid's corpora, under that corpus's name."""

    corpus: str
    seqlen: int = Field(default=2048, ge=8)
    max_windows: int = Field(default=256, ge=1)


class Evaluation(Spec):
    """What is measured on every model of a grid."""

    perplexity: tuple[GridPerplexity, ...] = ()
    tasks: tuple[Annotated[TaskSpec, BeforeValidator(named)], ...] = ()
    task_folder: Annotated[TestbedTasksSpec | LocalTasks, Field(discriminator="kind")] | None = None
    batch_size: int = Field(default=32, ge=1)

    @model_validator(mode="after")
    def _measures_something(self) -> "Evaluation":
        if not self.perplexity and not self.tasks:
            raise ValueError("measures nothing; give perplexity or tasks")
        names = [entry.corpus for entry in self.perplexity] + [task.name for task in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name!r} is measured twice; leave one")
        return self


class Cost(Spec):
    """What the estimate of a plan rests on."""

    flops_per_second: float = Field(default=4.0e14, gt=0.0)
    """Rate of matrix products on one device: a half of what an H200 reaches in bfloat16."""

    parameters: dict[str, float] = Field(default_factory=dict)
    """Parameters of each model of the grid that does not tell them itself."""


class Replicas(Spec):
    """How many actors a stage has while there is work for them."""

    min: int = Field(default=1, ge=1)
    """Started at once, and kept while there is work for any."""

    max: int | None = Field(default=None, ge=1)
    """At the most; None takes as many as the cluster has room for."""

    @model_validator(mode="before")
    @classmethod
    def _fixed(cls, value: object) -> object:
        """`replicas: 4` is a minimum and a maximum."""
        return {"min": value, "max": value} if isinstance(value, int) else value

    @model_validator(mode="after")
    def _in_order(self) -> "Replicas":
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max {self.max} is less than min {self.min}: raise max or lower min")
        return self


class StageResources(Spec):
    """What one kind of stage asks of a node."""

    cpus: int = Field(default=1, ge=1)
    gpus: float = Field(default=0.0, ge=0.0)
    memory_bytes: int | None = Field(default=None, ge=1)
    replicas: Replicas = Replicas()
    retries: int = Field(default=2, ge=0)

    def resources(self) -> Resources:
        """The same, as the cluster takes it."""
        return Resources(
            **self.model_dump(exclude={"replicas"}),
            min_replicas=self.replicas.min,
            max_replicas=self.replicas.max,
        )


StageName = Literal[
    "pretrain",
    "testbed-tasks",
    "generate",
    "score",
    "filter",
    "windows",
    "outliers",
    "prune",
    "evaluate",
]


class Grid(Spec):
    """A grid file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the results table."""

    models: dict[str, GridModel] = Field(min_length=1)
    corpora: dict[str, GridCorpus] = Field(default_factory=dict)
    calibrations: dict[str, GridCalibration] = Field(default_factory=dict)

    cells: dict[str, Any]
    """Fields of a cell; every list is an axis, and all axes are multiplied."""

    include: tuple[dict[str, Any], ...] = ()
    """Further cells, written likewise."""

    exclude: tuple[dict[str, Any], ...] = ()
    """Cells that agree with all fields of an entry are left out."""

    evaluate: Evaluation

    checkpoints: bool = False
    """Store every pruned model as an ordinary checkpoint, also where masks would do: sixteen times
    the bytes in half precision. `export` makes one of a single model."""

    resources: dict[StageName, StageResources] = Field(default_factory=dict)
    cost: Cost = Cost()


def load_grid(path: Path) -> Grid:
    """Read a grid file, and name the content of every local file that it speaks of.

    Raises:
        InputError: naming field, value and remedy.
    """
    return _with_fingerprints(read_grid(path))


def read_grid(path: Path) -> Grid:
    """Read a grid file whose local files may be those of another machine.

    Raises:
        InputError: naming field, value and remedy.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise InputError("grid", str(path), "there is no such file") from error
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        reason = " ".join(str(error).split())
        raise InputError("grid", str(path), f"is not a YAML file: {reason}") from error
    if not isinstance(content, dict):
        raise InputError("grid", str(path), "must be a mapping with name, models, cells, evaluate")
    _refuse_credentials(content, ())
    try:
        grid = Grid.model_validate(content)
    except ValidationError as error:
        raise explained(error, ()) from error
    for name in grid.cost.parameters:
        if name not in grid.models:
            raise InputError("cost.parameters", name, suggestion(name, grid.models))
    return grid


def refuse_credentials(field: str, text: str) -> None:
    """See that a URL holds no user and password: specs, manifests and logs would keep them.

    Raises:
        InputError: if it does; the message does not repeat them.
    """
    if _CREDENTIALS.search(text):
        shown = _CREDENTIALS.sub("://...@", text)
        remedy = "has credentials in it, which would be stored: give them by the environment"
        raise InputError(field, shown, remedy)


_CREDENTIALS = re.compile(r"://[^/@\s]*:[^/@\s]*@")


def _refuse_credentials(value: object, where: tuple[str, ...]) -> None:
    match value:
        case str():
            refuse_credentials(".".join(where), value)
        case dict():
            for name, item in value.items():
                _refuse_credentials(item, (*where, str(name)))
        case list():
            for item in value:
                _refuse_credentials(item, where)


def suggestion(name: str, known: Iterable[str]) -> str:
    """What a person may have meant by an unknown name."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known are {', '.join(names)}" if names else "none is defined"


def explained(error: ValidationError, where: tuple[str, ...]) -> InputError:
    """The first mistake in a line, with how many more there are."""
    details = error.errors(include_url=False)
    first = details[0]
    tags = {"hub-model", "local-model", "hub-corpus", "file-corpus", "testbed-corpus"}
    tags |= {"vllm-engine", "transformers-engine", "CorpusCalibration", "GeneratedCalibration"}
    path = [str(part) for part in (*where, *first["loc"]) if str(part) not in tags]
    field = ".".join(path) or "grid"
    remedy = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        remedy = "there is no such field; remove it or correct its name"
    elif first["type"] == "missing":
        remedy = "is missing; add it"
    if len(details) > 1:
        remedy += f" (and {len(details) - 1} more)"
    value = None if first["type"] == "missing" else first["input"]
    return InputError(field, value, remedy)


def _with_fingerprints(grid: Grid) -> Grid:
    corpora = {
        name: corpus.model_copy(update={"fingerprint": fingerprint(corpus.path)})
        if isinstance(corpus, FileCorpus)
        else corpus
        for name, corpus in grid.corpora.items()
    }
    models = {
        name: model.model_copy(update={"fingerprint": fingerprint(model.path, whole_files=False)})
        if isinstance(model, LocalModel)
        else model
        for name, model in grid.models.items()
    }
    evaluate = grid.evaluate
    if isinstance(evaluate.task_folder, LocalTasks):
        folder = evaluate.task_folder
        tasks = folder.model_copy(update={"fingerprint": fingerprint(folder.path)})
        evaluate = evaluate.model_copy(update={"task_folder": tasks})
    return grid.model_copy(update={"corpora": corpora, "models": models, "evaluate": evaluate})
