"""Multiple-choice tasks over the testbed's facts and rules, as an ordinary lm-eval task folder."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from pipeline.specs import TestbedTasksSpec
from pipeline.testbed.domains import equation
from pipeline.testbed.draws import Draws
from pipeline.testbed.language import inflect, is_reserved
from pipeline.testbed.lexicon import ATTRIBUTES, World, build_world

_CHOICES = 4

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


class Question(TypedDict):
    """A beginning, choices that continue it, and the place of the right one."""

    question: str
    choices: list[str]
    answer: int


def run(spec: TestbedTasksSpec, artifacts: Mapping[str, Path], output: Path) -> dict[str, Any]:
    """Write one YAML and one JSON Lines file per task.

    lm-eval looks for the latter in the working directory. A copy of the folder that
    `pipeline.evaluation.task_data.copy_tasks` makes runs from anywhere.

    Returns:
        The report: tasks, and questions per task.
    """
    world = build_world(spec.world)
    for name, ask in _TASKS.items():
        draws = Draws("task", name, spec.world.seed)
        answers = draws.balanced(range(_CHOICES), spec.questions)
        rows = [ask(world, draws, answer) for answer in answers]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        (output / f"{name}.yaml").write_text(TASK.format(name=name), encoding="utf-8")
    return {"tasks": len(_TASKS), "questions": spec.questions}


def facts_question(world: World, draws: Draws, answer: int) -> Question:
    """Ask for a fact about a person, in the words of the training text."""
    person = draws.pick(world.people)
    attribute = draws.pick(list(ATTRIBUTES))
    right = person.facts[attribute]
    others = [value for value in world.values[attribute] if value != right]
    choices = draws.several(others, _CHOICES - 1)
    choices.insert(answer, right)
    words = draws.pick(ATTRIBUTES[attribute])
    return Question(question=f"{person.name} {words}", choices=choices, answer=answer)


def arithmetic_question(world: World, draws: Draws, answer: int) -> Question:
    """Ask for a two-digit sum or difference; the other choices lie near it on both sides."""
    rank, step = draws.number(0, _CHOICES - 1), draws.pick((1, 2, 3))
    while True:
        left, sign, right, result = equation(draws)
        numbers = [result + (place - rank) * step for place in range(_CHOICES)]
        if numbers[0] >= 10 and numbers[-1] <= 99:
            break
    numbers.remove(result)
    choices = [str(number) for number in draws.shuffled(numbers)]
    choices.insert(answer, str(result))
    return Question(question=f"{left} {sign} {right} =", choices=choices, answer=answer)


def agreement_question(world: World, draws: Draws, answer: int) -> Question:
    """Ask which form of an adjective agrees with a noun that it follows in no text."""
    language = world.language
    noun = draws.number(0, len(language.nouns) - 1)
    adjective = draws.pick(
        [place for place in range(len(language.adjectives)) if is_reserved(noun, place)]
    )
    right = language.noun_classes[noun]
    classes = draws.shuffled([other for other in range(_CHOICES) if other != right])
    classes.insert(answer, right)
    choices = [inflect(language.adjectives[adjective], noun_class) for noun_class in classes]
    return Question(question=language.nouns[noun], choices=choices, answer=answer)


_TASKS: Mapping[str, Callable[[World, Draws, int], Question]] = {
    "testbed_facts": facts_question,
    "testbed_arithmetic": arithmetic_question,
    "testbed_foreign": agreement_question,
}

TASK_NAMES = tuple(_TASKS)
"""The tasks' names in lm-eval."""
