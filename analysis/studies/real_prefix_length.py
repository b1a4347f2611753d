"""How long the prefixes of a real model's self-generation should be."""

from analysis.finding import declared_answer
from analysis.study import Answer, Results, Study


def answer(results: Results) -> Answer:
    """Judge short prefixes against long ones and against none."""
    return declared_answer(
        results,
        "SmolLM2-135M at 50 %, by the length of self-generation's prefixes",
        "Long prefixes bring their source's text into the set; on other text they could lose.",
    )


STUDY = Study(
    "real-prefix-length",
    "How long should the prefixes of a real model's self-generation be?",
    "prefixes of 1 to 4 tokens against those of 16 and more",
    answer,
)
