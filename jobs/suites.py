"""Suites of tasks and perplexities, as `jobs/suites/*.yaml` names them."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, model_validator

from pipeline.data.presets import PERPLEXITY_PRESETS
from pipeline.errors import InputError, did_you_mean
from pipeline.specs import LocalTasks, PerplexityProtocol, Spec, TaskSpec, TestbedTasksSpec

SUITES_FOLDER = Path(__file__).parent / "suites"


def _from_protocol(value: object) -> object:
    """`{protocol: NAME, field: value}` as the fields that it stands for."""
    if not isinstance(value, Mapping) or "protocol" not in value:
        return value
    name = value["protocol"]
    if not isinstance(name, str) or name not in PERPLEXITY_PRESETS:
        remedy = f"there is no such protocol; {did_you_mean(str(name), PERPLEXITY_PRESETS)}"
        raise InputError("protocol", name, remedy)
    rest = {field: item for field, item in value.items() if field != "protocol"}
    return {**PERPLEXITY_PRESETS[name].model_dump(), **rest}


class CorpusPerplexity(PerplexityProtocol):
    """A perplexity on a corpus of the grid, or on a preset, under that name."""

    corpus: str


GridPerplexity = Annotated[CorpusPerplexity, BeforeValidator(_from_protocol)]


class SuiteTask(TaskSpec):
    """A task, and which of its metrics the suite is about."""

    metric: str
    """As the results call it."""

    def task(self) -> TaskSpec:
        """The task alone."""
        return TaskSpec(name=self.name, num_fewshot=self.num_fewshot, limit=self.limit)


class Suite(Spec):
    """What belongs together in a table."""

    tasks: tuple[SuiteTask, ...] = ()
    perplexity: tuple[GridPerplexity, ...] = ()

    task_folder: Annotated[TestbedTasksSpec | LocalTasks, Field(discriminator="kind")] | None = None
    """Where tasks beyond lm-eval's own are found."""

    averages: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Name to the tasks whose metrics are averaged, each with the same weight."""

    retention: bool = False
    """Whether averages are given as shares of the dense model's, too."""

    @model_validator(mode="after")
    def _averages_are_of_its_tasks(self) -> "Suite":
        known = {task.name for task in self.tasks}
        for name, members in self.averages.items():
            missing = [member for member in members if member not in known]
            if missing or not members:
                raise ValueError(f"average {name} needs tasks of the suite: not {missing}")
        return self

    def metric(self, task: str) -> str:
        """The metric of a task of the suite."""
        return next(entry.metric for entry in self.tasks if entry.name == task)


@functools.cache
def load_suite(name: str) -> Suite:
    """A suite by its name.

    Raises:
        ValueError: if there is none.
    """
    path = SUITES_FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = did_you_mean(name, [each.stem for each in SUITES_FOLDER.glob("*.yaml")])
        raise ValueError(f"there is no suite {name!r}; {known}")
    content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    return Suite.model_validate(content)


class SuiteUse(Spec):
    """A suite in a grid."""

    name: str
    """One of `jobs/suites/`."""

    limit: int | None = Field(default=None, ge=1)
    """At most so many questions per task; every table says so."""

    seqlen: int | None = Field(default=None, ge=8)
    """Tokens of the perplexities' windows, where the model takes no more; it moves the numbers."""

    @model_validator(mode="after")
    def _is_known(self) -> "SuiteUse":
        load_suite(self.name)
        return self

    @property
    def suite(self) -> Suite:
        """What it names."""
        return load_suite(self.name)

    def tasks(self) -> list[TaskSpec]:
        """Its tasks."""
        limit = {} if self.limit is None else {"limit": self.limit}
        return [entry.task().model_copy(update=limit) for entry in self.suite.tasks]

    def perplexities(self) -> list[CorpusPerplexity]:
        """Its perplexities."""
        seqlen = {} if self.seqlen is None else {"seqlen": self.seqlen}
        return [entry.model_copy(update=seqlen) for entry in self.suite.perplexity]
