"""Endless text of the testbed's world; any document can be written alone."""

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
"""The mixture that the testbed's model is trained on."""

MISMATCHED_MIXTURE: Mapping[str, float] = {"recipes": 0.4, "dialogue": 0.4, "facts": 0.2}
"""Stands for a public corpus: only prose, much of it of a kind that the model never saw."""


def world_documents(
    world: WorldSpec, mixture: Mapping[str, float], split: str, seed: int
) -> Iterator[tuple[str, str]]:
    """Yield document ids and texts without end, the same for the same arguments.

    Another split or seed gives other documents. In two mixtures, the documents at one place are
    the same if both draw the same domain.

    Raises:
        InputError: if the mixture names an unknown domain.
    """
    check_mixture(mixture)
    return (world_document(world, mixture, split, seed, index) for index in itertools.count())


def world_document(
    world: WorldSpec, mixture: Mapping[str, float], split: str, seed: int, index: int
) -> tuple[str, str]:
    """Return the id and text of the document at one place of a stream."""
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
    """Check that the world has all domains of a mixture.

    Raises:
        InputError: if not; it names the unknown and the known ones.
    """
    unknown = sorted(set(mixture) - set(DOMAINS))
    if unknown:
        raise InputError("mixture", ", ".join(unknown), f"the domains are {', '.join(DOMAINS)}")
