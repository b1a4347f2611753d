"""The methods written plainly after their papers and the shape of their published code: one window
at a time, statistics for each linear layer apart, everything in the layout of the formulas.

They stand beside `pipeline` as a second opinion on its masks and as the yardstick of its speed.
"""

from benchmarks.baseline import dsnot, magnitude, sparsegpt, wanda
from benchmarks.baseline.walk import Method

METHODS: dict[str, Method] = {
    "magnitude": Method(None, magnitude.choose),
    "wanda": Method(wanda.SquaredNorms, wanda.choose),
    "sparsegpt": Method(sparsegpt.Hessian, sparsegpt.choose),
    "dsnot": Method(dsnot.Moments, dsnot.choose),
}
"""By the names that the pruners have in `pipeline`."""
