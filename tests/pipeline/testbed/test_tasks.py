"""The testbed's tasks are fair questions that lm-eval can ask and only a trained model answers."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pipeline.evaluation.task_data import copy_tasks
from pipeline.evaluation.tasks import task_manager
from pipeline.specs import TestbedTasksSpec, WorldSpec
from pipeline.testbed import tasks
from pipeline.testbed.language import CLASS_ENDINGS, is_reserved, transliterate
from pipeline.testbed.lexicon import ATTRIBUTES, build_world

SPEC = TestbedTasksSpec(questions=400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tasks")
    tasks.run(SPEC, {}, output)
    return output


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def all_rows(folder: Path) -> list[dict[str, Any]]:
    return [row for name in tasks.TASK_NAMES for row in rows(folder, name)]


def test_it_leaves_one_yaml_and_one_json_lines_file_a_task(folder: Path, tmp_path: Path) -> None:
    report = tasks.run(SPEC, {}, tmp_path)
    names = {f"{name}.{ending}" for name in tasks.TASK_NAMES for ending in ("yaml", "jsonl")}
    assert {path.name for path in folder.iterdir()} == names
    assert report == {"tasks": 3, "questions": 400}
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


def test_every_question_has_four_different_choices_and_right_ones_at_every_place(
    folder: Path,
) -> None:
    for name in tasks.TASK_NAMES:
        asked = rows(folder, name)
        assert len(asked) == SPEC.questions
        assert all(len(set(row["choices"])) == len(row["choices"]) == 4 for row in asked)
        assert set(Counter(row["answer"] for row in asked).values()) == {100}


def test_neither_length_nor_order_of_the_choices_reveals_the_answer(folder: Path) -> None:
    features = {
        "length": lambda choices: [len(choice) for choice in choices],
        "order": lambda choices: [
            sorted(choices, key=lambda choice: (len(choice), choice)).index(choice)
            for choice in choices
        ],
    }
    for name in tasks.TASK_NAMES:
        asked = rows(folder, name)
        for measure in features.values():
            for wanted in (0, 1, 2, 3, -1):  # the guesser takes the first, ... or last by measure
                expected = hits = 0.0
                for row in asked:
                    values = measure(row["choices"])
                    target = sorted(values)[wanted]
                    fitting = [place for place in range(4) if values[place] == target]
                    hits += (row["answer"] in fitting) / len(fitting)
                    expected += 1 / 4
                assert abs(hits - expected) < 4 * math.sqrt(0.25 * 0.75 * len(asked))


def test_facts_are_asked_in_the_words_of_the_text(folder: Path) -> None:
    world = build_world(SPEC.world)
    truth = {
        f"{person.name} {wording}": (attribute, person.facts[attribute])
        for person in world.people
        for attribute, wordings in ATTRIBUTES.items()
        for wording in wordings
    }
    for row in rows(folder, "testbed_facts"):
        attribute, value = truth[row["question"]]
        assert row["choices"][row["answer"]] == value
        assert set(row["choices"]) <= set(world.values[attribute])


def test_sums_are_right_and_all_choices_have_two_digits(folder: Path) -> None:
    for row in rows(folder, "testbed_arithmetic"):
        left, sign, right, _ = row["question"].split()
        result = int(left) + int(right) if sign == "+" else int(left) - int(right)
        assert int(row["choices"][row["answer"]]) == result
        assert all(10 <= int(choice) <= 99 for choice in row["choices"])


def test_agreement_is_asked_for_pairs_that_occur_in_no_text(folder: Path) -> None:
    language = build_world(SPEC.world).language
    for row in rows(folder, "testbed_foreign"):
        noun = language.nouns.index(row["question"])
        right = row["choices"][row["answer"]]
        ending = transliterate(CLASS_ENDINGS[language.noun_classes[noun]])
        assert right.endswith(ending)
        stem = right.removesuffix(ending)
        assert is_reserved(noun, language.adjectives.index(stem))
        assert {choice.removeprefix(stem) for choice in row["choices"]} == {
            transliterate(ending) for ending in CLASS_ENDINGS
        }


def test_another_world_asks_other_questions(folder: Path, tmp_path: Path) -> None:
    tasks.run(TestbedTasksSpec(world=WorldSpec(seed=1)), {}, tmp_path)
    known = {json.dumps(row) for row in rows(folder, "testbed_facts")}
    assert not known & {json.dumps(row) for row in rows(tmp_path, "testbed_facts")}


def accuracies(model: Any, tokenizer: Any, folder: Path, copy: Path) -> dict[str, float]:
    copy_tasks(folder, copy, copy / "cache")
    results = simple_evaluate(
        HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=64),
        tasks=list(tasks.TASK_NAMES),
        task_manager=task_manager(copy),
        bootstrap_iters=0,
    )["results"]
    return {name: results[name]["acc,none"] for name in tasks.TASK_NAMES}


def test_a_trained_model_answers_and_one_with_random_weights_guesses(
    tiny_model_folder: Path, folder: Path, tmp_path: Path
) -> None:
    source = tiny_model_folder / "model"
    tokenizer = AutoTokenizer.from_pretrained(source)
    trained = AutoModelForCausalLM.from_pretrained(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        untrained = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))

    learnt = accuracies(trained, tokenizer, folder, tmp_path / "trained")
    guessed = accuracies(untrained, tokenizer, folder, tmp_path / "untrained")

    deviation = math.sqrt(0.25 * 0.75 / SPEC.questions)
    assert all(abs(value - 0.25) < 4 * deviation for value in guessed.values())
    # Sums are beyond so small a model; facts and agreement are not.
    both = (learnt["testbed_facts"] + learnt["testbed_foreign"]) / 2
    assert both > 0.25 + 4 * deviation / math.sqrt(2)
    assert learnt["testbed_facts"] > guessed["testbed_facts"] + 3 * deviation
