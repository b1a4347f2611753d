"""Which calibration data keeps which kind of a real model's text."""

from analysis.finding import declared_answer
from analysis.retention import with_worst_retained
from analysis.study import Answer, Results, Study


def answer(results: Results) -> Answer:
    """Judge each kind on its own text, mixtures without a kind, and self-generated text."""
    return declared_answer(
        results._replace(table=with_worst_retained(results.table)),
        "SmolLM2-135M at 50 %: each kind of text, by the kinds of its calibration",
        "A model with other shares of these kinds in its pretraining text could differ.",
    )


STUDY = Study(
    "real-coverage",
    "Which calibration data keeps which kind of text on a real model?",
    "on each kind's text, calibration in that kind against calibration in the others",
    answer,
)
