"""Whether fitted weights make up for a cheap mask, and which data they need."""

from analysis.finding import declared_answer
from analysis.study import Answer, Results, Study


def answer(results: Results) -> Answer:
    """Judge reconstructed masks against costly pruners, and the fit's data against the mask's."""
    return declared_answer(
        results,
        "Perplexity of Wanda's masks with fitted weights, against other pruners and other data",
        "Of the sets, one is changed at a time, then both.",
    )


STUDY = Study(
    "reconstruction",
    "Do fitted weights make up for a cheap mask, and which data do they need?",
    "reconstructed Wanda against SparseGPT and ALPS; its two sets apart",
    answer,
)
