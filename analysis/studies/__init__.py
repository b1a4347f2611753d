"""The studies: one question, one module and one grid file each."""

from analysis.studies import (
    amount,
    compressors,
    cost,
    filter,
    generator,
    language,
    mixing,
    predictor,
    prefix_length,
    real_compressors,
    real_coverage,
    real_filter,
    real_language,
    real_prefix_length,
    real_sparsity,
    reconstruction,
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
        compressors,
        reconstruction,
        real_coverage,
        real_filter,
        real_prefix_length,
        real_sparsity,
        real_language,
        real_compressors,
    )
}
"""By name, in the order of the page of findings."""
