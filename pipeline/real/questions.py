"""Multiple-choice questions for the last word of a passage, as lm-eval tasks."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import yaml

from pipeline.data.corpora import Document
from pipeline.testbed.tasks import Question

QUESTIONS = 200
"""Questions for each kind of text."""

CHOICES = 4

CONTEXT_CHARACTERS = 120
"""Characters of a passage before its last word."""

LAST_WORD = re.compile(r"(?<=\S )[A-Za-z]{4,}(?=[.!?;:,)\]]*\n|[.!?] )")
"""The word at the end of a sentence or a line, after a space."""


def write_tasks(kind: str, held_out: Iterable[Document], folder: Path) -> None:
    """Write the tasks `real_lastword_<kind>` and, as a control, `real_lastword_<kind>_shuffled`.

    The control asks the same questions, each with the passage of another one: a model that beats
    chance on it uses something other than the passage.
    """
    questions = last_word_questions(held_out, np.random.default_rng(0))
    name = f"real_lastword_{kind}"
    _write_task(name, questions, folder)
    _write_task(f"{name}_shuffled", shuffled_passages(questions), folder)


def last_word_questions(
    documents: Iterable[Document], generator: np.random.Generator, count: int = QUESTIONS
) -> list[Question]:
    """Draw passages; the choices are their last word and last words of other passages.

    Wrong choices match the right one in capitalization and, roughly, in length.
    """
    passages = [
        (text[: found.start()][-CONTEXT_CHARACTERS:].partition(" ")[2].rstrip(" "), found[0])
        for _, text in documents
        for found in LAST_WORD.finditer(text)
        if found.start() > CONTEXT_CHARACTERS
    ]
    drawn = [passages[place] for place in generator.choice(len(passages), count, replace=False)]
    words = sorted({word for _, word in drawn})
    questions = []
    for number, (passage, word) in enumerate(drawn):
        others = [other for other in words if other != word]
        # Capitals first: they give away more than the length.
        others.sort(
            key=lambda other: (other.istitle() != word.istitle(), abs(len(other) - len(word)))
        )
        drawn_from = others[: 4 * CHOICES]
        choices = [str(other) for other in generator.choice(drawn_from, CHOICES - 1, replace=False)]
        choices.insert(number % CHOICES, word)
        questions.append(Question(question=passage, choices=choices, answer=number % CHOICES))
    return questions


def shuffled_passages(questions: Sequence[Question]) -> list[Question]:
    """Return the questions, each with the passage of the one before."""
    return [
        {**question, "question": before["question"]}
        for before, question in zip([questions[-1], *questions[:-1]], questions, strict=True)
    ]


def _write_task(name: str, questions: Sequence[Question], folder: Path) -> None:
    lines = [json.dumps(question, ensure_ascii=False) + "\n" for question in questions]
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(_task(name), sort_keys=False))


def _task(name: str) -> dict[str, object]:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
