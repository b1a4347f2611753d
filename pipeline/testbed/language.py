"""An invented language: its script, its words and its grammar.

The verb comes last. A noun belongs to one of four classes, which its form does not show. An
adjective follows its noun; the endings of adjective and verb agree with the noun's class. Foreign
names are written by sound.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.testbed.draws import Draws

_FIRST_LETTER = 0x0561
"""The small letter ayb: the script borrows the Armenian letters, in their order."""

_SCRIPT = {ord("a") + place: _FIRST_LETTER + place for place in range(26)}

CLASS_ENDINGS = ("ul", "em", "ak", "or")
"""Endings of adjectives and verbs, one for each noun class; all equally long."""

NOUN_COUNT = 24
ADJECTIVE_COUNT = 12
VERB_COUNT = 10


@dataclass(frozen=True)
class Language:
    """Words in the language's own script; nouns and verbs have no endings."""

    nouns: Sequence[str]
    noun_classes: Sequence[int]
    adjectives: Sequence[str]
    verbs: Sequence[str]
    values: Mapping[str, str]
    """Words for the English values of facts."""

    predicates: Mapping[str, str]
    """Verbs that state an attribute of a person."""


def transliterate(text: str) -> str:
    """Write Latin letters in the language's script, without case."""
    return text.lower().translate(_SCRIPT)


def is_reserved(noun: int, adjective: int) -> bool:
    """Return whether a noun and an adjective meet in no text, so that tasks can ask for them."""
    return (noun + adjective) % 4 == 0


def inflect(stem: str, noun_class: int) -> str:
    """Return a stem with the ending of a noun class."""
    return stem + transliterate(CLASS_ENDINGS[noun_class])


def build_language(seed: int, values: Sequence[str], attributes: Sequence[str]) -> Language:
    """Draw the words of a language, one for each value and attribute among them."""
    draws = Draws("language", seed)
    count = NOUN_COUNT + ADJECTIVE_COUNT + VERB_COUNT + len(values) + len(attributes)
    words = iter(_stems(draws, count))
    return Language(
        nouns=[next(words) for _ in range(NOUN_COUNT)],
        noun_classes=draws.balanced(range(len(CLASS_ENDINGS)), NOUN_COUNT),
        adjectives=[next(words) for _ in range(ADJECTIVE_COUNT)],
        verbs=[next(words) for _ in range(VERB_COUNT)],
        values={value: next(words) for value in values},
        predicates={attribute: next(words) for attribute in attributes},
    )


def _stems(draws: Draws, count: int) -> list[str]:
    stems: dict[str, None] = {}
    while len(stems) < count:
        syllables = [
            draws.pick("hjkqtxy") + draws.pick("aeiou") + draws.pick("nst") for _ in range(2)
        ]
        stems[transliterate("".join(syllables))] = None
    return list(stems)
