"""What a grid declares before it runs: contrasts, choices, and the smallest effects of interest.

`analysis` judges what is declared here; `run` stores it before there are results.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, field_validator, model_validator

from pipeline.errors import InputError
from pipeline.specs import Spec

POWER = 0.8
"""Probability with which `plan` wants a contrast to be seen."""

LEVEL = 0.05
"""Of a family's tests. A test compares it with the confidence at which `analysis` judges."""

STEPS = 4000
"""Points of the integral over the estimated standard deviation."""


def with_pruner(content: object) -> object:
    """Return a mapping with `compressor`, another name of `pruner`, under that name.

    Raises:
        InputError: if it has both.
    """
    if not isinstance(content, Mapping) or "compressor" not in content:
        return content
    if "pruner" in content:
        remedy = "is another name of pruner, which is there too: leave one"
        raise InputError("compressor", content["compressor"], remedy)
    return {("pruner" if name == "compressor" else name): each for name, each in content.items()}


Selection = Annotated[dict[str, Any], BeforeValidator(with_pruner)]
"""Values of cells' fields, each one value or a list of them, written as under `cells`."""


class Measure(Spec):
    """The number that is compared, and the cells in question."""

    where: Selection = Field(default_factory=dict)
    """Fields that all compared cells have; empty for all pruned cells."""

    metric: str = "perplexity"
    """Name of the metric in the results."""

    tasks: tuple[str, ...] = ()
    """Corpora or tasks to average over; empty for all that have the metric."""


class Contrast(Measure):
    """One selection of cells against another.

    Cells pair up that have the same model and seed and agree in all fields of `cells` and `include`
    but those of `of` and `against`. A field that means nothing to one of them agrees.
    """

    of: Selection = Field(min_length=1)
    """Fields of the first side."""

    against: Selection = Field(min_length=1)
    """Fields of the second side."""

    smallest: float = Field(gt=0.0)
    """Smallest effect of interest: percent of perplexity, percentage points of an accuracy, else
    the metric's own unit, such as bits per byte."""

    spread: float = Field(gt=0.0)
    """Expected standard deviation of the contrast between models, in the same unit."""

    family: str = "contrasts"
    """Contrasts of one family are corrected together."""

    @model_validator(mode="after")
    def _sides_differ(self) -> "Contrast":
        if self.of == self.against:
            raise ValueError("of and against select the same cells: name what they differ in")
        return self


class Choice(Measure):
    """A comparison with the best of several candidates."""

    among: str
    """Field whose values are the candidates, such as `calibration`."""


class Floor(Spec):
    """Levels beyond which a model is of no use: no contrast is claimed there."""

    times_dense: float | None = Field(default=None, gt=1.0)
    """This many times the dense model's number, for metrics of which lower is better."""

    levels: dict[str, float] = Field(default_factory=dict)
    """By corpus or task, such as a unigram model's perplexity, or the accuracy of guessing."""

    @model_validator(mode="after")
    def _is_given(self) -> "Floor":
        if self.times_dense is None and not self.levels:
            raise ValueError("gives no floor: give times_dense or levels, or remove it")
        return self


class Design(Spec):
    """A grid's questions, declared before its results exist."""

    seeds: Literal["nested", "crossed"] = "nested"
    """`nested`: each model has seeds of its own, those of `cells` for the first model and the next
    ones for each later model, so that its calibration data are draws of its own. `crossed`: all
    models have the same seeds, and what they share of these draws adds to the intervals."""

    contrasts: dict[str, Contrast] = Field(default_factory=dict)
    choices: dict[str, Choice] = Field(default_factory=dict)
    floor: Floor | None = None

    @field_validator("contrasts", "choices")
    @classmethod
    def _named(cls, entries: dict[str, Any]) -> dict[str, Any]:
        if "" in entries:
            raise ValueError("a name is empty: give one")
        return entries

    @model_validator(mode="after")
    def _asks_something(self) -> "Design":
        if not self.contrasts and not self.choices:
            raise ValueError("asks nothing; give contrasts or choices")
        return self

    def family_size(self, family: str) -> int:
        """Return the number of contrasts that are corrected together."""
        return sum(contrast.family == family for contrast in self.contrasts.values())


def detectable(metric: str, spread: float, models: int, family: int) -> float:
    """Return the effect that is seen with 80 % power, in the metric's unit; NaN for one model.

    The test is Student's t over models, two-sided at 5 %, corrected for the family (Bonferroni).
    Power is that of the noncentral t. What windows add is not counted.

    Args:
        metric: the metric's name; perplexities are compared by ratio.
        spread: expected standard deviation between models, in the metric's unit.
        models: number of models.
        family: number of contrasts that are corrected together.
    """
    if models < 2:
        return math.nan
    # Imported late: scipy takes as long as all that the command line imports.
    from scipy import optimize, stats

    freedom = models - 1
    critical = float(stats.t.isf(LEVEL / family / 2, freedom))
    # the noncentral t by its definition: scipy's gives NaN for few models and a large family
    estimated = np.sqrt(stats.chi2.isf((np.arange(STEPS) + 0.5) / STEPS, freedom) / freedom)

    def lacking(shift: float) -> float:
        above = stats.norm.sf(critical * estimated - shift)
        below = stats.norm.cdf(-critical * estimated - shift)
        return float((above + below).mean()) - POWER

    shift = float(optimize.brentq(lacking, 0.0, 3 * critical + 5)) / math.sqrt(models)
    if metric.endswith("perplexity"):
        return 100 * math.expm1(shift * math.log1p(spread / 100))
    return shift * spread
