"""Whether calibration data matter to quantizers and to refitted weights on a real model."""

from analysis.finding import declared_answer
from analysis.study import Answer, Results, Study


def answer(results: Results) -> Answer:
    """Judge a mismatched corpus and self-generated text against a mixture with each compressor."""
    return declared_answer(
        results,
        "SmolLM2-135M, perplexity by calibration and compressor",
        "Effects of different compressors compare only by what each costs.",
    )


STUDY = Study(
    "real-compressors",
    "Do calibration data matter to quantizers and to refitted weights on a real model?",
    "a mismatched corpus, Python code, against a mixture with each compressor",
    answer,
)
