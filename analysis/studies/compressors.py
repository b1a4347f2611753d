"""Whether calibration data matter to quantizers and to refitted weights as they do to masks."""

from analysis.charts import logarithmic_beyond_one
from analysis.finding import declared_answer
from analysis.study import Answer, Results, Study


def answer(results: Results) -> Answer:
    """Judge self-generated text against the mismatched corpus with each compressor."""
    found = declared_answer(
        results,
        "Perplexity after compression with self-generated text, against the mismatched corpus",
        "Effects of different compressors compare only by what each costs.",
    )
    logarithmic_beyond_one(found.figure)
    return found


STUDY = Study(
    "compressors",
    "Do calibration data matter to quantizers and to refitted weights as they do to masks?",
    "self-generated text against the mismatched corpus with each compressor",
    answer,
)
