"""Endless text of the testbed's world, any document of which can be written on its own."""

import itertools
from bisect import bisect
from collections.abc import Iterator, Mapping

from pipeline.errors import InputError
from pipeline.specs import WorldSpec
from pipeline.testbed.domains import DOMAINS
from pipeline.testbed.draws import Draws
from pipeline.testbed.lexicon import OPENINGS, build_world

PRETRAINING_MIXTURE: Mapping[str, float] = {
    "facts": 0.3,
    "dialogue": 0.2,
    "arithmetic": 0.2,
    "code": 0.15,
    "foreign": 0.15,
}
"""What the testbed's model is trained on."""

MISMATCHED_MIXTURE: Mapping[str, float] = {"recipes": 0.4, "dialogue": 0.4, "facts": 0.2}
"""Stands for a public corpus: prose only, and much of it of a kind that the model never saw."""


def documents(
    world: WorldSpec, mixture: Mapping[str, float], split: str, seed: int
) -> Iterator[tuple[str, str]]:
    """Document ids and texts without end, the same for the same arguments.

    Streams of another split or seed draw everything anew. In two mixtures, documents of the same
    place are the same wherever both draw the same domain.

    Raises:
        InputError: if the mixture names a domain that is not there.
    """
    check_mixture(mixture)
    return (document(world, mixture, split, seed, index) for index in itertools.count())


def document(
    world: WorldSpec, mixture: Mapping[str, float], split: str, seed: int, index: int
) -> tuple[str, str]:
    """Id and text of the document at one place of a stream."""
    draws = Draws("document", world.seed, split, seed, index)
    names = sorted(mixture)
    bounds = list(itertools.accumulate(mixture[name] for name in names))
    name = names[bisect(bounds[:-1], draws.share() * bounds[-1])]
    domain = DOMAINS[name]
    opening = f"{draws.pick(OPENINGS)}\n" if draws.share() < world.shared_openings else ""
    count = draws.number(domain.shortest, domain.longest)
    paragraphs = domain.paragraphs(build_world(world), draws)
    text = opening + domain.separator.join(itertools.islice(paragraphs, count))
    return f"{name}/{split}/{seed}/{index}", text


def check_mixture(mixture: Mapping[str, float]) -> None:
    """Refuse domains that the world does not have.

    Raises:
        InputError: naming them and the ones there are.
    """
    unknown = sorted(set(mixture) - set(DOMAINS))
    if unknown:
        raise InputError("mixture", ", ".join(unknown), f"the domains are {', '.join(DOMAINS)}")
