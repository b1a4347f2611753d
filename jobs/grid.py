"""Grid files: what a person writes."""

import contextlib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from cluster.graph import Resources
from jobs.design import Design, with_pruner
from jobs.dtypes import AutoDtype, with_dtypes
from jobs.outside import with_fingerprints
from jobs.stages import HIDDEN_BYTES, STAGES
from jobs.suites import CorpusPerplexity, GridPerplexity, SuiteUse
from jobs.trainings import with_trainings
from jobs.yaml_file import line_number, read_yaml
from pipeline.data.presets import CORPUS_PRESETS
from pipeline.errors import InputError, did_you_mean
from pipeline.mistakes import explained
from pipeline.real.prepare import REAL_FOLDER
from pipeline.specs import (
    Corpus,
    EvaluationOptions,
    FilterOptions,
    Fraction,
    GenerationOptions,
    HubModel,
    LocalModel,
    LocalTasks,
    Mixture,
    PretrainSpec,
    Pruner,
    Spec,
    TaskSpec,
    TestbedTasksSpec,
)
from pipeline.testbed.presets import PRETRAIN_PRESETS


def _from_preset(presets: Mapping[str, BaseModel], value: object) -> object:
    """Return the fields that a preset's name, or `{preset: NAME, field: value}`, stands for."""
    entry = {"preset": value} if isinstance(value, str) else value
    if not isinstance(entry, Mapping) or "preset" not in entry:
        return entry
    name = entry["preset"]
    if not isinstance(name, str) or name not in presets:
        raise ValueError(f"there is no preset {name!r}; {did_you_mean(str(name), presets)}")
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


def with_name(value: object) -> object:
    """Return `"wanda"` as `{name: wanda}`: a name alone means all defaults."""
    return {"name": value} if isinstance(value, str) else value


def _at_path(value: object) -> object:
    """Return `"words.txt"` as `{path: words.txt}`."""
    return {"path": value} if isinstance(value, str) else value


def _here(value: object) -> object:
    """Replace `auto` by the engine that is installed where the grid is read."""
    if value != "auto":
        return value
    return "vllm" if importlib.util.find_spec("vllm") else "transformers"


CorpusNames = Annotated[
    Annotated[str, Tag("one-corpus")]
    | Annotated[Mixture, Field(min_length=2), Tag("corpus-mixture")],
    Discriminator(lambda value: "one-corpus" if isinstance(value, str) else "corpus-mixture"),
]
"""Name of one of the grid's corpora, or the names of several and their weights."""


def corpus_names(chosen: CorpusNames) -> list[str]:
    """Return the names of the chosen corpora."""
    return [chosen] if isinstance(chosen, str) else list(chosen)


class RealText(Spec):
    """Real text of one corpus, or of several."""

    corpus: CorpusNames
    """Where windows are cut from."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_fields_of_other_texts(cls, content: Any) -> Any:
        for name, value in content.items() if isinstance(content, Mapping) else ():
            if name not in cls.model_fields and name in PooledCalibration.model_fields:
                remedy = (
                    "is for a choice among samples: remove it, or add pool, the number of samples "
                    "to draw from the corpus"
                )
                raise InputError(name, value, remedy)
            if name not in cls.model_fields and name in CorpusCalibration.model_fields:
                remedy = "each sample of a pool is a stretch of one text: remove packing, or pool"
                raise InputError(name, value, remedy)
            if name not in cls.model_fields and name in GeneratedCalibration.model_fields:
                remedy = "is for text that a model writes: remove it, or give prefixes, not corpus"
                raise InputError(name, value, remedy)
        return content

    @property
    def corpora(self) -> list[str]:
        """Names of the corpora that windows are cut from."""
        return corpus_names(self.corpus)


class CorpusCalibration(RealText):
    """Windows cut straight from a corpus, or from several."""

    packing: Literal["sample", "concat"] = "sample"
    """How windows are cut."""


class PooledCalibration(RealText, FilterOptions):
    """Windows that a rule chooses from a pool of real text."""

    pool: int = Field(ge=1)
    """Samples of a window's length, each from a text of its own, that the filter gets."""

    scorer: str | None = None
    """Name of the grid's model whose scores and hidden states decide which samples are dropped;
    unset, the model to prune. Both must have the same tokenizer."""

    shard_size: int = Field(default=64, ge=1)
    """Samples that are scored together."""

    _words_at_path = field_validator("banned_words", mode="before")(_at_path)


class PrunedGenerator(Spec):
    """A pruned version of the model that is to be pruned."""

    pruner: Annotated[Pruner, BeforeValidator(with_name)]
    sparsity: Fraction

    calibration: str | None = None
    """Name of the grid's calibration to prune it with, at the cell's seed, nsamples and seqlen;
    None if, and only if, its pruner takes no data."""

    _compressors_too = model_validator(mode="before")(with_pruner)

    @model_validator(mode="after")
    def _data_where_needed(self) -> "PrunedGenerator":
        if self.pruner.calibrated != (self.calibration is not None):
            remedy = "needs a calibration" if self.pruner.calibrated else "takes no calibration"
            raise ValueError(f"generator's pruner {self.pruner.name} {remedy}")
        return self


def _generator_tag(value: object) -> str:
    return "ModelName" if isinstance(value, str) else PrunedGenerator.__name__


Generator = Annotated[
    Annotated[str, Tag("ModelName")] | Annotated[PrunedGenerator, Tag(PrunedGenerator.__name__)],
    Discriminator(_generator_tag),
]


class GeneratedCalibration(GenerationOptions, FilterOptions):
    """Text that a model writes from prefixes of a corpus, filtered by a rule.

    `backend` may be `auto`: vLLM if that is installed where the grid is read, else transformers.
    Keys hold the engine, never `auto`. `banned_words` may be the file's path alone.
    """

    prefixes: CorpusNames
    """Where prefixes are cut from."""

    generator: Generator | None = None
    """The writing model: the name of one of the grid's models, or `{pruner: magnitude, sparsity:
    0.5}` for a pruned version of the cell's model. Unset, the cell's model itself."""

    generation_seed: int | None = Field(default=None, ge=0)
    """Use one set of texts for all seeds, which then draw only the windows and what a rule of the
    filter draws. Unset, each seed has its own set."""

    scorer: str | None = None
    """Name of the grid's model whose scores and hidden states decide which samples are dropped;
    unset, the writing model. Both must have the same tokenizer."""

    include_prefix: bool = False
    """Include the given tokens in the perplexity."""

    packing: Literal["sample", "concat"] = "concat"
    """How windows are cut."""

    _engine_here = field_validator("backend", mode="before")(_here)
    _words_at_path = field_validator("banned_words", mode="before")(_at_path)

    @property
    def corpora(self) -> list[str]:
        """Names of the corpora that prefixes are cut from."""
        return corpus_names(self.prefixes)


def _calibration_tag(value: object) -> str | None:
    if not isinstance(value, Mapping):
        return type(value).__name__
    if "corpus" in value:
        return (PooledCalibration if "pool" in value else CorpusCalibration).__name__
    return GeneratedCalibration.__name__ if "prefixes" in value else None


GridCalibration = Annotated[
    Annotated[CorpusCalibration, Tag(CorpusCalibration.__name__)]
    | Annotated[PooledCalibration, Tag(PooledCalibration.__name__)]
    | Annotated[GeneratedCalibration, Tag(GeneratedCalibration.__name__)],
    Discriminator(
        _calibration_tag,
        custom_error_type="no_source",
        custom_error_message="give corpus for real text, or prefixes for text that a model writes",
    ),
]


class Evaluation(EvaluationOptions):
    """What is measured on every model of a grid; `backend` is written as for a calibration."""

    suites: tuple[Annotated[SuiteUse, BeforeValidator(with_name)], ...] = ()
    """Names of sets of tasks and perplexities. Entries below replace those of the same name."""

    perplexity: tuple[GridPerplexity, ...] = ()
    tasks: tuple[Annotated[TaskSpec, BeforeValidator(with_name)], ...] = ()

    _engine_here = field_validator("backend", mode="before")(_here)

    @model_validator(mode="after")
    def _measures_something(self) -> "Evaluation":
        if not self.perplexity and not self.tasks and not self.suites:
            raise ValueError("measures nothing; give suites, perplexity or tasks")
        names = [entry.corpus for entry in self.perplexity] + [task.name for task in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name!r} is measured twice; leave one")
        self.all_tasks()
        self.all_perplexities()
        return self

    def all_tasks(self) -> tuple[TaskSpec, ...]:
        """Return the tasks of all suites, each once, and the grid's own."""
        suites = [(task.name, task) for use in self.suites for task in use.tasks()]
        return tuple(_each_once(suites, {task.name: task for task in self.tasks}))

    def all_perplexities(self) -> tuple[CorpusPerplexity, ...]:
        """Return the perplexities of all suites, each once, and the grid's own."""
        suites = [(entry.corpus, entry) for use in self.suites for entry in use.perplexities()]
        return tuple(_each_once(suites, {entry.corpus: entry for entry in self.perplexity}))

    @property
    def folder(self) -> TestbedTasksSpec | LocalTasks | None:
        """The folder of tasks besides lm-eval's own: the grid's, else that of one of its suites."""
        named_by = [self.task_folder, *(use.suite.task_folder for use in self.suites)]
        return next((folder for folder in named_by if folder is not None), None)


_AnySpec = TypeVar("_AnySpec", bound=Spec)


def _each_once(suites: list[tuple[str, _AnySpec]], own: dict[str, _AnySpec]) -> list[_AnySpec]:
    """Return what suites measure, replaced by the grid's own entries of the same name."""
    chosen: dict[str, _AnySpec] = {}
    for name, entry in suites:
        if name in own:
            chosen[name] = own[name]
        elif chosen.setdefault(name, entry) != entry:
            raise ValueError(f"{name!r} is measured in two ways by two suites; name it by itself")
    return list((chosen | own).values())


class Description(Spec):
    """Describe every calibration set: its scores and what it covers go into the results table."""

    reference: str | None = None
    """Name of the grid's corpus to compare each set with."""

    reference_windows: int = Field(default=512, ge=1)
    """Windows of the reference."""


class Cost(Spec):
    """Assumptions of estimates."""

    flops_per_second: float | None = Field(default=None, gt=0.0)
    """Rate of matrix products on the devices of one stage; unset, `jobs.cost.GPU_FLOPS` for each
    GPU that it asks for, else `CORE_FLOPS` for each core."""

    parameters: dict[str, float] = Field(default_factory=dict)
    """Parameters of models whose number is not in their spec, files or configuration."""


class Replicas(Spec):
    """How many actors a stage has while there is work for them."""

    min: int = Field(default=1, ge=1)
    """Started at once, and kept while there is work for any."""

    max: int | None = Field(default=None, ge=1)
    """Upper limit; None takes as many as the cluster has room for."""

    @model_validator(mode="before")
    @classmethod
    def _fixed(cls, value: object) -> object:
        """Read `replicas: 4` as minimum and maximum."""
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
    """Host memory to reserve. Without a GPU, `score`, `describe` and `evaluate` read models whose
    weights take more than 80 % of it one decoder layer at a time."""

    actors: int = Field(default=1, ge=1)
    """Actors that share one stage, each with these cpus, gpus and memory: `prune` and `outliers`
    with at least as many `window_groups`. `replicas` counts stages side by side."""

    replicas: Replicas = Replicas()
    retries: int = Field(default=2, ge=0)
    time_limit_seconds: float | None = Field(default=None, gt=0.0)

    device_hidden_bytes: int | None = Field(default=None, ge=0)
    """Most bytes of hidden states to hold on the device. All of them take nsamples * seqlen *
    hidden size * bytes of the dtype. Unset, 4 GiB. Only for stages that read a model one decoder
    layer at a time: `prune`, `score`, `describe` and `evaluate`."""

    host_hidden_bytes: int | None = Field(default=None, ge=0)
    """Most bytes of further hidden states to hold in host memory. Of a pruning the rest goes to
    files in the system's temporary folder (`TMPDIR`); the other stages pass further texts later,
    and read the model again. Unset, 16 GiB. Only for these stages."""

    @field_validator("gpus")
    @classmethod
    def _shares_one_or_takes_whole_ones(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError("a stage takes a fraction of one GPU, or whole ones: round it")
        return gpus

    def resources(self) -> Resources:
        """Return them as the cluster takes them."""
        return Resources(
            **self.model_dump(exclude={"replicas", *HIDDEN_BYTES}),
            min_replicas=self.replicas.min,
            max_replicas=self.replicas.max,
        )

    def settings(self, stage: str) -> dict[str, int]:
        """Return the fields that are set and that the stage's `run` takes."""
        return self.model_dump(include=set(STAGES[stage].settings), exclude_none=True)


class Grid(Spec):
    """A grid file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the results table."""

    note: str | None = None
    """What readers of the results must know; it goes with the results everywhere."""

    models: dict[str, GridModel] = Field(min_length=1)
    corpora: dict[str, GridCorpus] = Field(default_factory=dict)
    calibrations: dict[str, GridCalibration] = Field(default_factory=dict)

    cells: dict[str, Any]
    """Fields of cells. Every list is an axis, and all axes are multiplied."""

    include: tuple[dict[str, Any], ...] = ()
    """Further cells: `cells` with these fields replaced."""

    exclude: tuple[dict[str, Any], ...] = ()
    """Cells that match all fields of an entry are left out."""

    evaluate: Evaluation

    describe: Description | None = None
    """Score every calibration set; None scores none."""

    design: Design | None = None
    """Contrasts that are declared before results exist."""

    checkpoints: bool = False
    """Store every pruned model as an ordinary checkpoint even if masks suffice: sixteen times the
    bytes in half precision. `export` makes one for a single model."""

    window_groups: int = Field(default=1, ge=1)
    """Groups of calibration windows whose statistics are added in a fixed order: as many actors
    can share a pruning (`resources.prune.actors`). Another number moves last bits, and is in the
    key."""

    resources: dict[str, StageResources] = Field(default_factory=dict)
    """By the name of a stage."""

    cost: Cost = Cost()

    _auto_dtypes: dict[str, AutoDtype] = PrivateAttr(default_factory=dict)
    _path: Path | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _with_models_written_out(
        cls, content: Any, validate: ModelWrapValidatorHandler["Grid"]
    ) -> "Grid":
        """Write out models of several trainings, and replace `dtype: auto`, so that specs and keys
        hold the dtype."""
        if not isinstance(content, Mapping):
            return validate(content)
        content, chosen = with_dtypes(with_trainings(content))
        grid = validate(content)
        grid._auto_dtypes.update(chosen)
        return grid

    @field_validator("cells", "include", "exclude", mode="before")
    @classmethod
    def _compressors_too(cls, given: Any) -> Any:
        several = isinstance(given, list | tuple)
        return [with_pruner(each) for each in given] if several else with_pruner(given)

    @field_validator("resources")
    @classmethod
    def _stages_take_them(cls, resources: dict[str, StageResources]) -> dict[str, StageResources]:
        for stage, asked in resources.items():
            if stage not in STAGES:
                raise InputError(stage, stage, f"is no stage; {did_you_mean(stage, STAGES)}")
            for field, budget in asked.model_dump(include=set(HIDDEN_BYTES)).items():
                if budget is not None and field not in STAGES[stage].settings:
                    takes = [name for name, kind in STAGES.items() if field in kind.settings]
                    remedy = f"only {', '.join(takes)} hold hidden states: remove it"
                    raise InputError(f"{stage}.{field}", budget, remedy)
            if asked.actors > 1 and not STAGES[stage].shared:
                takes = [name for name, kind in STAGES.items() if kind.shared]
                remedy = f"actors share only {' and '.join(takes)}: remove it"
                raise InputError(f"{stage}.actors", asked.actors, remedy)
        return resources

    @model_validator(mode="after")
    def _each_actor_has_windows(self) -> "Grid":
        for stage, asked in self.resources.items():
            if asked.actors > self.window_groups:
                remedy = (
                    f"each actor takes groups of windows, and window_groups is "
                    f"{self.window_groups}: raise that, or lower this"
                )
                raise InputError(f"resources.{stage}.actors", asked.actors, remedy)
        return self

    @model_validator(mode="after")
    def _name_the_presets_that_are_measured(self) -> "Grid":
        """Add the presets that only `evaluate` names to the corpora, whose files are hashed."""
        for entry in self.evaluate.all_perplexities():
            if entry.corpus in CORPUS_PRESETS:
                self.corpora.setdefault(entry.corpus, CORPUS_PRESETS[entry.corpus])
        return self

    @property
    def auto_dtypes(self) -> Mapping[str, AutoDtype]:
        """The choice for each model with `dtype: auto`, by name."""
        return self._auto_dtypes


@contextlib.contextmanager
def lines_of(grid: Grid) -> Iterator[None]:
    """Add the line of the field in the grid's file to mistakes."""
    try:
        yield
    except InputError as error:
        if grid._path is None:
            raise
        raise located(error, grid._path) from error


def located(error: InputError, path: Path) -> InputError:
    """Return the mistake with the line of its field in a file, if the file has it."""
    line = line_number(path, error.field)
    if line is None:
        return error
    return InputError(error.field, error.value, f"{error.remedy} (line {line})")


def load_grid(path: Path) -> Grid:
    """Read a grid file, and add fingerprints of the local files that it names.

    Raises:
        InputError: naming field, value and remedy.
    """
    grid = read_grid(path)
    try:
        with lines_of(grid):
            return with_fingerprints(grid)
    except InputError as error:
        if not str(error.value).startswith(REAL_FOLDER):
            raise
        option = " --books" if "/books/" in str(error.value) else ""
        remedy = f"{error.remedy}; `python -m jobs prepare{option}` makes what the demo reads"
        raise InputError(error.field, error.value, remedy) from error


def read_grid(path: Path) -> Grid:
    """Read a grid file whose local files may be on another machine.

    Raises:
        InputError: naming field, value and remedy.
    """
    content = read_yaml("grid", path)
    if not isinstance(content, dict):
        raise InputError("grid", str(path), "must be a mapping with name, models, cells, evaluate")
    try:
        grid = grid_of(content)
    except InputError as error:
        raise located(error, path) from error
    grid._path = path
    return grid


def grid_of(content: Mapping[str, Any]) -> Grid:
    """Return the grid with a file's content, without fingerprints.

    Raises:
        InputError: naming field, value and remedy.
    """
    _refuse_credentials(content, ())
    try:
        grid = Grid.model_validate(content)
    except ValidationError as error:
        raise explained(error, (), content) from error
    for name in grid.cost.parameters:
        if name not in grid.models:
            raise InputError("cost.parameters", name, did_you_mean(name, grid.models))
    return grid


def refuse_credentials(field: str, text: str) -> None:
    """Check that a URL holds no user and password: specs, manifests and logs would keep them.

    Raises:
        InputError: if it does, without repeating them.
    """
    if _CREDENTIALS.search(text):
        shown = _CREDENTIALS.sub("://...@", text)
        remedy = "holds credentials, which would be stored: give them by the environment"
        raise InputError(field, shown, remedy)


_CREDENTIALS = re.compile(r"://[^/@\s]*:[^/@\s]*@")


def _refuse_credentials(value: object, where: tuple[str, ...]) -> None:
    match value:
        case str():
            refuse_credentials(".".join(where), value)
        case Mapping():
            for name, item in value.items():
                _refuse_credentials(item, (*where, str(name)))
        case list():
            for item in value:
                _refuse_credentials(item, where)
