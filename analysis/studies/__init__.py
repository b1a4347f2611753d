"""The studies: one question, one module and one grid file each."""

from analysis.studies import (
    amount,
    cost,
    filter,
    generator,
    language,
    mixing,
    predictor,
    prefix_length,
    similarity,
    sparsity,
)
from analysis.study import Study

STUDIES: dict[str, Study] = {
    module.STUDY.name: module.STUDY
    for module in (
        prefix_length,
        generator,
        predictor,
        sparsity,
        filter,
        language,
        amount,
        similarity,
        mixing,
        cost,
    )
}
"""By name, in the order of the page of findings."""
