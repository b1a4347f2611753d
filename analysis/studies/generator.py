"""Whether pruned versions of a model write calibration data that prunes it as well."""

from analysis.finding import declared_answer
from analysis.study import Answer, Results, Study


def answer(results: Results) -> Answer:
    """Judge the text of pruned generators against that of the dense one."""
    return declared_answer(
        results,
        "Perplexity after pruning with text of pruned generators, at 60 %",
        "No text is filtered. A generator that is pruned further than these could write worse.",
    )


STUDY = Study(
    "generator",
    "Does calibration data that a pruned version of the model writes prune as well as its own?",
    "unfiltered text of all pruned generators against that of the dense one",
    answer,
)
