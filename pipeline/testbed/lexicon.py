"""The people, places and words that all domains of the testbed's world share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from pipeline.specs import WorldSpec
from pipeline.testbed.draws import Draws
from pipeline.testbed.language import Language, build_language

NUMERALS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]
CRAFTS = [
    "baker",
    "weaver",
    "smith",
    "potter",
    "miller",
    "tailor",
    "sailor",
    "teacher",
    "doctor",
    "painter",
]
INSTRUMENTS = ["flute", "drum", "harp", "fiddle", "horn", "lute", "bell", "organ"]
ANIMALS = ["cat", "dog", "goat", "horse", "raven", "hare", "fox", "lamb", "snake", "duck"]
DISHES = ["soup", "bread", "rice", "fish", "beans", "cheese", "apples", "honey", "eggs", "cake"]
REGIONS = ["north", "south", "east", "west"]
COLOUR_WORDS = ["red", "blue", "green", "white", "black", "yellow", "brown", "grey"]

CITY_COUNT = 12

OPENINGS = (
    "Here is the next page of the book.",
    "Here is the first part of the letter.",
    "Here is what was found in the box.",
    "This is the first page of the box.",
    "This is a copy of the old letter.",
    "This is what came with the morning post.",
    "The next part of the book is this.",
    "The first lines of the page are these.",
    "On the next page we read this.",
    "On the back of the letter we found this.",
    "From the old box in the library.",
    "From a copy of the morning paper.",
)
"""Openings that do not reveal the domain; each is longer than four tokens."""

ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "birthplace": ("was born in", "came into the world in"),
    "home": ("lives in", "has a house in"),
    "craft": ("works as a", "earns a living as a"),
    "instrument": ("plays the", "is known to play the"),
    "animal": ("keeps a", "never travels without a"),
    "dish": ("likes to eat", "asks every evening for"),
    "colour": ("always wears", "paints every door in"),
}
"""A person's attributes, and the wordings before the value."""

_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
_ENDINGS = ("n", "r", "s", "l")


@dataclass(frozen=True)
class Person:
    """A person and the facts about them."""

    given_name: str
    family_name: str
    facts: Mapping[str, str]

    @property
    def name(self) -> str:
        """Given and family name."""
        return f"{self.given_name} {self.family_name}"


@dataclass(frozen=True)
class City:
    """A city and the facts about it."""

    name: str
    region: str
    dish: str


@dataclass(frozen=True)
class World:
    """All facts of one world."""

    people: Sequence[Person]
    cities: Sequence[City]
    values: Mapping[str, Sequence[str]]
    """The values that each attribute takes."""

    language: Language


@lru_cache(maxsize=16)
def build_world(spec: WorldSpec) -> World:
    """Draw the people and facts of a world; all values of an attribute are equally common."""
    draws = Draws("world", spec.seed)
    city_names = [name + draws.pick(("mere", "ford", "by")) for name in _names(draws, CITY_COUNT)]
    cities = [
        City(*row)
        for row in zip(
            city_names,
            draws.balanced(REGIONS, CITY_COUNT),
            draws.balanced(DISHES, CITY_COUNT),
            strict=True,
        )
    ]
    given_names = [name + draws.pick(_ENDINGS) for name in _names(draws, spec.people)]
    family_names = [name + "sky" for name in _names(draws, spec.people)]
    values = {
        "birthplace": city_names,
        "home": city_names,
        "craft": CRAFTS,
        "instrument": INSTRUMENTS,
        "animal": ANIMALS,
        "dish": DISHES,
        "colour": COLOUR_WORDS,
    }
    columns = {name: draws.balanced(values[name], spec.people) for name in ATTRIBUTES}
    people = [
        Person(given, family, {name: columns[name][row] for name in ATTRIBUTES})
        for row, (given, family) in enumerate(zip(given_names, family_names, strict=True))
    ]
    words = list(dict.fromkeys(value for column in values.values() for value in column))
    return World(people, cities, values, build_language(spec.seed, words, list(ATTRIBUTES)))


def _names(draws: Draws, count: int) -> list[str]:
    """Draw different names of as few syllables as possible."""
    length = 2
    while len(_SYLLABLES) ** length < 4 * count:
        length += 1
    names: dict[str, None] = {}
    while len(names) < count:
        name = "".join(draws.pick(_SYLLABLES) for _ in range(length))
        names[name.capitalize()] = None
    return list(names)
