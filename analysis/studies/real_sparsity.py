"""From which sparsity on calibration data matters on a real model."""

from analysis.finding import declared_answer
from analysis.study import Answer, Results, Study


def answer(results: Results) -> Answer:
    """Judge a mismatched corpus and self-generated text against a mixture at each target."""
    return declared_answer(
        results,
        "SmolLM2-135M, perplexity by calibration and target",
        "Japanese is further from the pretraining text than any corpus that one would take.",
    )


STUDY = Study(
    "real-sparsity",
    "From which sparsity on does calibration data matter on a real model?",
    "a mismatched corpus, Japanese, against a mixture at each target",
    answer,
)
