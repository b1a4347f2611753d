"""Which calibration data keeps which language of a bilingual model."""

from analysis.finding import declared_answer
from analysis.study import Answer, Results, Study


def answer(results: Results) -> Answer:
    """Judge calibration in each language, in both and self-generated, on both languages."""
    return declared_answer(
        results,
        "Each language after pruning, by the language of the calibration data, at 60 %",
        "The languages have unequal shares of the pretraining text, and no script in common: those "
        "of a real model have more in common.",
    )


STUDY = Study(
    "language",
    "Which calibration data keeps which language of a model that has two?",
    "calibration in a language against calibration in the other, for each language's text",
    answer,
)
