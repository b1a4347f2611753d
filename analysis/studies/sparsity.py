"""From which sparsity on self-generated calibration data matters."""

from analysis.charts import logarithmic_beyond_one
from analysis.finding import declared_answer
from analysis.study import Answer, Results, Study


def answer(results: Results) -> Answer:
    """Judge self-generated text against the corpus at each target."""
    found = declared_answer(
        results,
        "Perplexity after pruning with self-generated text, against the mismatched corpus",
        "Where it begins to matter depends on the smallest effect of interest, and on how far the "
        "corpus is from the pretraining text.",
    )
    logarithmic_beyond_one(found.figure)  # effects differ by two orders of magnitude
    return found


STUDY = Study(
    "sparsity",
    "From which sparsity on does self-generated calibration data matter?",
    "unfiltered self-generated text against the mismatched corpus at each target",
    answer,
)
