"""Which calibration data keeps which language of a real model."""

from analysis.finding import declared_answer
from analysis.study import Answer, Results, Study


def answer(results: Results) -> Answer:
    """Judge each language on its own text and questions."""
    return declared_answer(
        results,
        "SmolLM2-135M at 50 %, by calibration in one language and in all",
        "The model was trained on English; a multilingual model has more to lose in the others.",
    )


STUDY = Study(
    "real-language",
    "Which calibration data keeps which language of a real model?",
    "on each language's text, calibration in that language against calibration in the others",
    answer,
)
