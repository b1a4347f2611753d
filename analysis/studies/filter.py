"""How much of the generated text to drop, and by what."""

from analysis.finding import declared_answer
from analysis.study import Answer, Results, Study


def answer(results: Results) -> Answer:
    """Judge the filters against each other and against none."""
    return declared_answer(
        results,
        "Perplexity after pruning with filtered text that the model wrote, at 60 %",
        "Sampling at a low temperature produces few bad samples; hotter sampling or a weaker model "
        "gives a filter more to drop.",
    )


STUDY = Study(
    "filter",
    "Should generated text be filtered, and by what?",
    "dropping the fifth of highest perplexity against dropping a random fifth",
    answer,
)
