"""Whether calibration data must cover all kinds of the pretraining text, or hold nothing else."""

from analysis.finding import declared_answer
from analysis.study import Answer, Results, Study


def answer(results: Results) -> Answer:
    """Judge kinds of text that are left out, and unseen text that is added."""
    return declared_answer(
        results,
        "Perplexity after pruning, by the kinds of text in the calibration data, at 60 %",
        "The kinds differ more here than those of real corpora. All are pruned by SparseGPT; Wanda "
        "depends less on its data.",
    )


STUDY = Study(
    "similarity",
    "Must calibration data cover all kinds of the pretraining text, or hold nothing else?",
    "two of the five kinds against all five with half unseen text",
    answer,
)
