"""The invented language keeps its own rules."""

import itertools

from pipeline.specs import WorldSpec
from pipeline.testbed.language import CLASS_ENDINGS, is_reserved, transliterate
from pipeline.testbed.lexicon import build_world
from pipeline.testbed.world import world_documents

WORLD = WorldSpec(shared_openings=0.0)


def sentences() -> list[list[str]]:
    texts = (
        text
        for _, text in itertools.islice(world_documents(WORLD, {"foreign": 1.0}, "train", 0), 200)
    )
    return [sentence.split() for text in texts for sentence in text.rstrip(".").split(". ")]


def test_it_is_written_in_another_script() -> None:
    letters = {letter for sentence in sentences() for word in sentence for letter in word}
    assert all(0x0561 <= ord(letter) <= 0x0586 for letter in letters)
    assert len(transliterate("abcdefghijklmnopqrstuvwxyz")) == 26
    assert len(set(transliterate("abcdefghijklmnopqrstuvwxyz"))) == 26


def test_adjectives_and_verbs_end_as_the_class_of_their_noun_asks() -> None:
    language = build_world(WORLD).language
    classes = dict(zip(language.nouns, language.noun_classes, strict=True))
    endings = [transliterate(ending) for ending in CLASS_ENDINGS]
    agreeing = [sentence for sentence in sentences() if sentence[0] in classes]
    assert len(agreeing) > 1000
    for subject, adjective, companion, other, verb in agreeing:
        assert adjective.endswith(endings[classes[subject]])
        assert other.endswith(endings[classes[companion]])
        assert verb.endswith(endings[classes[subject]])


def test_reserved_pairs_of_noun_and_adjective_appear_in_no_text() -> None:
    language = build_world(WORLD).language
    text = " ".join(" ".join(sentence) for sentence in sentences())
    seen = 0
    for (noun, noun_word), (adjective, stem) in itertools.product(
        enumerate(language.nouns), enumerate(language.adjectives)
    ):
        appears = f"{noun_word} {stem}" in text
        assert appears != is_reserved(noun, adjective)
        seen += appears
    assert seen == len(language.nouns) * len(language.adjectives) * 3 // 4


def test_it_states_the_facts_of_the_world() -> None:
    world = build_world(WORLD)
    language = world.language
    true = {
        (transliterate(person.given_name), language.values[value], language.predicates[attribute])
        for person in world.people
        for attribute, value in person.facts.items()
    }
    stated = {tuple(sentence) for sentence in sentences() if len(sentence) == 3}
    assert stated <= true
    assert len(stated) > len(true) // 2
