"""How much of a real model's own text to drop, and by what."""

from analysis.finding import declared_answer
from analysis.study import Answer, Results, Study


def answer(results: Results) -> Answer:
    """Judge the filters against each other and against none."""
    return declared_answer(
        results,
        "SmolLM2-135M at 50 %, by how its own text is filtered",
        "Sampling at a higher temperature gives a filter more to drop.",
    )


STUDY = Study(
    "real-filter",
    "Should a real model's own text be filtered, and by what?",
    "dropping the fifth of highest perplexity against dropping a random fifth",
    answer,
)
