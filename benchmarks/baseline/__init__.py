"""Pruning methods written plainly after their papers and published code: one window at a time,
separate statistics for each linear layer, all in the layout of the formulas.

They check the masks of `pipeline`, and are the yardstick of its speed.
"""

from benchmarks.baseline import dsnot, magnitude, sparsegpt, wanda
from benchmarks.baseline.walk import Method

METHODS: dict[str, Method] = {
    "magnitude": Method(None, magnitude.choose_by_magnitude),
    "wanda": Method(wanda.PlainSquaredNorms, wanda.choose_by_wanda),
    "sparsegpt": Method(sparsegpt.PlainHessian, sparsegpt.choose_by_sparsegpt),
    "dsnot": Method(dsnot.Moments, dsnot.choose_by_dsnot),
}
"""By the pruners' names in `pipeline`."""
