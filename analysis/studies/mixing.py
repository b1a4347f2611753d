"""Which kinds of text one source of calibration data keeps, and which a mixture keeps."""

from analysis.finding import declared_answer
from analysis.retention import with_worst_retained
from analysis.study import Answer, Results, Study


def answer(results: Results) -> Answer:
    """Judge mixed data against single sources, by the worst kind and by each."""
    return declared_answer(
        results._replace(table=with_worst_retained(results.table)),
        "What is left of each kind of text after pruning with mixed data, against single sources",
        "The mixture has equal parts of all measured kinds; a kind that it lacks would be on the "
        "other side of this comparison. All are pruned by SparseGPT at 60 %; Wanda depends less on "
        "its data.",
    )


STUDY = Study(
    "mixing",
    "Does calibration data of several sources keep a model's capabilities better than one source?",
    "mixed data against each single source, by the kind of text that is kept worst",
    answer,
)
