"""How many windows of calibration data are enough, and how long they should be."""

from analysis.finding import declared_answer
from analysis.study import Answer, Results, Study


def answer(results: Results) -> Answer:
    """Judge fewer windows against the most, and short windows against long ones."""
    return declared_answer(
        results,
        "Perplexity after pruning with fewer or shorter windows, at 60 %",
        "The windows are of pretraining text. A wider model has more input directions to cover, "
        "and may need more windows.",
    )


STUDY = Study(
    "amount",
    "How many windows of calibration data are enough, and how long should they be?",
    "16, 64 and 256 windows against 512",
    answer,
)
