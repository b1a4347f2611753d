"""The kinds of text in the testbed's world: each domain writes endless paragraphs."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from pipeline.testbed.draws import Draws
from pipeline.testbed.language import Language, inflect, is_reserved, transliterate
from pipeline.testbed.lexicon import (
    ANIMALS,
    ATTRIBUTES,
    COLOUR_WORDS,
    DISHES,
    NUMERALS,
    REGIONS,
    Person,
    World,
)

LARGEST_OPERAND = 15


@dataclass(frozen=True)
class Domain:
    """A kind of text."""

    paragraphs: Callable[[World, Draws], Iterator[str]]
    """Writes the endless paragraphs of one document."""

    separator: str
    """Text between two paragraphs."""

    shortest: int
    """Least number of paragraphs in a document."""

    longest: int
    """Largest number of paragraphs in a document."""


def facts(world: World, draws: Draws) -> Iterator[str]:
    """State facts about people and cities."""
    while True:
        if draws.share() < 0.1:
            city = draws.pick(world.cities)
            yield (
                f"{city.name} lies in the {city.region}. "
                f"The people of {city.name} are proud of their {city.dish}."
            )
            continue
        person = draws.pick(world.people)
        attributes = draws.several(list(ATTRIBUTES), 4)
        sentences = [_statement(person, attribute, draws) for attribute in attributes]
        yield " ".join(sentences)


def _statement(person: Person, attribute: str, draws: Draws) -> str:
    name = person.name if draws.share() < 0.5 else person.given_name
    return f"{name} {draws.pick(ATTRIBUTES[attribute])} {person.facts[attribute]}."


def dialogue(world: World, draws: Draws) -> Iterator[str]:
    """Write a conversation of two people, line by line."""
    first, second = (person.given_name for person in draws.several(world.people, 2))
    while True:
        asker, answerer = (first, second) if draws.share() < 0.5 else (second, first)
        for speaker, line in zip(
            (asker, answerer) * 2, draws.pick(_EXCHANGES)(world, draws), strict=False
        ):
            yield f"{speaker}: {line}"


def _at_the_market(world: World, draws: Draws) -> list[str]:
    dish, other = draws.several(DISHES, 2)
    price = draws.number(1, 12)
    return [
        f"What did you buy at the market in {draws.pick(world.cities).name}?",
        f"I bought some {dish} and a little {other}.",
        f"How much did you pay for the {draws.pick((dish, other))}?",
        f"Only {NUMERALS[price]} coins, can you believe it?",
    ]


def _looking_for(world: World, draws: Draws) -> list[str]:
    animal = draws.pick(ANIMALS)
    place = draws.pick(("under the table", "behind the house", "near the river", "in the garden"))
    return [
        f"Have you seen my {draws.pick(COLOUR_WORDS)} {animal}?",
        f"Yes, the {animal} was {place}.",
        f"I looked {place}, but the {animal} is gone!",
        "Oh no, then we must go and look again.",
    ]


def _asking_how(world: World, draws: Draws) -> list[str]:
    feeling, other = draws.several(("tired", "happy", "hungry", "sad", "angry", "cold"), 2)
    time = draws.pick(("today", "tonight", "this morning", "this week"))
    return [
        f"Hello, how are you {time}?",
        f"Thank you, I am {feeling}, but not {other}.",
        f"Why are you {feeling}?",
        f"I do not know. Are you never {feeling}?",
    ]


def _sharing(world: World, draws: Draws) -> list[str]:
    dish = draws.pick(DISHES)
    had = draws.number(6, 20)
    given = draws.number(1, 5)
    return [
        f"How many bags of {dish} do you have?",
        f"I have {NUMERALS[had]} of them.",
        f"Please give me {NUMERALS[given]}, my friend.",
        f"Here you are, so now I have {NUMERALS[had - given]}.",
    ]


_EXCHANGES = (_at_the_market, _looking_for, _asking_how, _sharing)


def arithmetic(world: World, draws: Draws) -> Iterator[str]:
    """Write sums, differences and series, in digits and in words."""
    while True:
        form = draws.share()
        if form < 0.7:
            yield "; ".join("{} {} {} = {}".format(*equation(draws)) for _ in range(2))
        elif form < 0.85:
            left, right = draws.number(0, 10), draws.number(0, 10)
            yield f"{NUMERALS[left]} plus {NUMERALS[right]} is {NUMERALS[left + right]}."
        else:
            start, step = draws.number(0, 9), draws.number(1, 5)
            yield ", ".join(str(start + step * place) for place in range(6))


def equation(draws: Draws) -> tuple[int, str, int, int]:
    """Return left operand, sign, right operand and result of a sum or a difference, from 0 up."""
    left, right = draws.number(0, LARGEST_OPERAND), draws.number(0, LARGEST_OPERAND)
    if draws.share() < 0.6:
        return left, "+", right, left + right
    return left + right, "-", right, left


def code(world: World, draws: Draws) -> Iterator[str]:
    """Define small functions and call them."""
    while True:
        verb = draws.pick(("count", "find", "sort", "sell", "move", "keep"))
        noun = draws.pick(ANIMALS + DISHES)
        name = f"{verb}_{noun}"
        items, item, limit = draws.pick(
            (("values", "value", "limit"), ("rows", "row", "size"), ("items", "item", "bound"))
        )
        result = draws.pick(("total", "result", "best"))
        sign = draws.pick(("+", "-", "*"))
        test = draws.pick((">", "<", "==", "!="))
        yield (
            f"def {name}({items}, {limit}):\n"
            f"    {result} = {draws.number(0, 9)}\n"
            f"    for {item} in {items}:\n"
            f"        if {item} {test} {limit}:\n"
            f"            {result} = {result} {sign} {item}\n"
            f"    return {result}\n"
        )
        if draws.share() < 0.6:
            values = ", ".join(str(draws.number(0, 9)) for _ in range(draws.number(2, 4)))
            yield f'print("{noun}", {name}([{values}], {draws.number(0, 9)}))\n'


def foreign(world: World, draws: Draws) -> Iterator[str]:
    """Describe things and people in the invented language."""
    while True:
        if draws.share() < 0.4:
            person = draws.pick(world.people)
            attribute = draws.pick(list(ATTRIBUTES))
            value = world.language.values[person.facts[attribute]]
            name = transliterate(person.given_name)
            yield f"{name} {value} {world.language.predicates[attribute]}."
        else:
            subject, verb_class = noun_phrase(world.language, draws)
            companion, _ = noun_phrase(world.language, draws)
            yield f"{subject} {companion} {inflect(draws.pick(world.language.verbs), verb_class)}."


def noun_phrase(language: Language, draws: Draws) -> tuple[str, int]:
    """Return a noun with an adjective that agrees with it, and the noun's class."""
    noun = draws.number(0, len(language.nouns) - 1)
    adjective = draws.pick(
        [place for place in range(len(language.adjectives)) if not is_reserved(noun, place)]
    )
    noun_class = language.noun_classes[noun]
    return (
        f"{language.nouns[noun]} {inflect(language.adjectives[adjective], noun_class)}",
        noun_class,
    )


def reports(world: World, draws: Draws) -> Iterator[str]:
    """Note weather and stocks in a clerk's terse lines."""
    number = draws.number(10, 80)
    while True:
        number += 1
        city = draws.pick(world.cities)
        dish, other = draws.several(DISHES, 2)
        week = draws.pick(("cold", "grey", "happy", "hungry"))
        yield (
            f"Report {number}, {city.name}, {city.region}: a {week} week, "
            f"river at {draws.number(10, 99)}, wind from the {draws.pick(REGIONS)}; "
            f"{dish} sold = {draws.number(10, 99)} bags, {other} in the house = "
            f"{draws.number(10, 99)} bags, price {draws.number(1, 9)}.{draws.number(10, 99)}"
        )


def recipes(world: World, draws: Draws) -> Iterator[str]:
    """Explain how to cook."""
    while True:
        dish, other = draws.several(DISHES, 2)
        number = NUMERALS[draws.number(2, 20)]
        vessel = draws.pick(("a deep pan", "a brown box", "a clay bowl", "a little oven"))
        manner = draws.pick(("gently", "slowly", "twice", "again and again"))
        yield draws.pick(
            (
                f"Take {number} bags of {dish} and mix {manner} with the {other}.",
                f"Keep {vessel} near the fire and move the {dish} into it {manner}.",
                f"Look for the {dish} to be {draws.pick(COLOUR_WORDS)}, then sort in the {other}.",
                f"Cook {number} minutes, cool {manner} and eat with {other}.",
            )
        )


DOMAINS: Mapping[str, Domain] = {
    "facts": Domain(facts, "\n", shortest=2, longest=14),
    "dialogue": Domain(dialogue, "\n", shortest=4, longest=36),
    "arithmetic": Domain(arithmetic, "\n", shortest=4, longest=34),
    "code": Domain(code, "\n", shortest=1, longest=10),
    "foreign": Domain(foreign, " ", shortest=5, longest=60),
    "reports": Domain(reports, "\n", shortest=2, longest=14),
    "recipes": Domain(recipes, " ", shortest=4, longest=30),
}
"""All kinds of text, by name."""
