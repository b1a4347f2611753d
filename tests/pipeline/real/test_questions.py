from collections import Counter

import numpy as np

from pipeline.data.corpora import Document
from pipeline.real.questions import (
    CHOICES,
    CONTEXT_CHARACTERS,
    last_word_questions,
    shuffled_passages,
)

WORDS = ["stone", "river", "house", "Paris", "walks", "quick", "night", "under", "bread", "glass"]


def texts(count: int = 40) -> list[Document]:
    draws = np.random.default_rng(0)
    sentences = [" ".join(draws.choice(WORDS, 30)) + ".\n" for _ in range(3 * count)]
    return [Document(str(n), "".join(sentences[3 * n : 3 * n + 3])) for n in range(count)]


def test_the_right_choice_is_the_texts_own_continuation() -> None:
    whole = {document.text for document in texts()}
    for question in last_word_questions(texts(), np.random.default_rng(1), 20):
        passage, answer = question["question"], question["choices"][question["answer"]]
        assert 0 < len(passage) <= CONTEXT_CHARACTERS
        assert any(f" {passage} {answer}." in text for text in whole)


def test_choices_differ_and_the_right_one_is_equally_often_at_each_place() -> None:
    questions = last_word_questions(texts(), np.random.default_rng(1), 40)
    assert all(len(set(question["choices"])) == CHOICES for question in questions)
    assert Counter(question["answer"] for question in questions) == dict.fromkeys(range(4), 10)
    assert len({question["question"] for question in questions}) == 40


def test_the_same_seed_gives_the_same_questions() -> None:
    first, second = (last_word_questions(texts(), np.random.default_rng(7), 20) for _ in range(2))
    assert first == second


def test_the_control_has_the_same_answers_and_no_question_its_own_passage() -> None:
    questions = last_word_questions(texts(), np.random.default_rng(1), 20)
    control = shuffled_passages(questions)
    for own, other in zip(questions, control, strict=True):
        assert own["choices"] == other["choices"]
        assert own["answer"] == other["answer"]
        assert own["question"] != other["question"]
    assert Counter(q["question"] for q in questions) == Counter(q["question"] for q in control)
