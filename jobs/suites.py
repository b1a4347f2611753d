"""Suites of tasks and perplexities, from `jobs/suites/*.yaml`."""

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
    """Return the fields that `{protocol: NAME, field: value}` stands for."""
    if not isinstance(value, Mapping) or "protocol" not in value:
        return value
    name = value["protocol"]
    if not isinstance(name, str) or name not in PERPLEXITY_PRESETS:
        remedy = f"there is no such protocol; {did_you_mean(str(name), PERPLEXITY_PRESETS)}"
        raise InputError("protocol", name, remedy)
    rest = {field: item for field, item in value.items() if field != "protocol"}
    return {**PERPLEXITY_PRESETS[name].model_dump(), **rest}


class CorpusPerplexity(PerplexityProtocol):
    """A perplexity on one of the grid's corpora or a preset."""

    corpus: str


GridPerplexity = Annotated[CorpusPerplexity, BeforeValidator(_from_protocol)]


class SuiteTask(TaskSpec):
    """A task, and the metric that the suite takes of it."""

    metric: str
    """Its name in the results."""


class Suite(Spec):
    """Tasks and perplexities that are measured together."""

    tasks: tuple[SuiteTask, ...] = ()
    perplexity: tuple[GridPerplexity, ...] = ()

    task_folder: Annotated[TestbedTasksSpec | LocalTasks, Field(discriminator="kind")] | None = None
    """Folder of tasks besides lm-eval's own."""

    averages: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Name of an average to its tasks, all of the same weight."""

    retention: bool = False
    """Also give averages as shares of the dense model's."""

    @model_validator(mode="after")
    def _averages_are_of_its_tasks(self) -> "Suite":
        known = {task.name for task in self.tasks}
        for name, members in self.averages.items():
            missing = [member for member in members if member not in known]
            if missing or not members:
                raise ValueError(f"average {name} needs tasks of the suite: not {missing}")
        return self

    def metric(self, task: str) -> str:
        """Return the metric of a task of the suite."""
        return next(entry.metric for entry in self.tasks if entry.name == task)


@functools.cache
def load_suite(name: str) -> Suite:
    """Read a suite by its name.

    Raises:
        ValueError: if there is none of this name.
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
    """The most questions of a task; every table states it."""

    seqlen: int | None = Field(default=None, ge=8)
    """Tokens of the perplexities' windows, for models that take no more; it changes the numbers."""

    @model_validator(mode="after")
    def _is_known(self) -> "SuiteUse":
        load_suite(self.name)
        return self

    @property
    def suite(self) -> Suite:
        """The suite of this name."""
        return load_suite(self.name)

    def tasks(self) -> list[TaskSpec]:
        """Return the suite's tasks."""
        return [
            TaskSpec(
                name=entry.name, num_fewshot=entry.num_fewshot, limit=self.limit or entry.limit
            )
            for entry in self.suite.tasks
        ]

    def perplexities(self) -> list[CorpusPerplexity]:
        """Return the suite's perplexities."""
        seqlen = {} if self.seqlen is None else {"seqlen": self.seqlen}
        return [entry.model_copy(update=seqlen) for entry in self.suite.perplexity]
