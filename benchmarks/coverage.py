"""Whether the studies' intervals and verdicts hold what they state, on simulated results.

`python -m benchmarks.coverage` prints the table of docs/studies.md. Each line simulates grids with
known effects and known variance between models, calibration draws and windows, has them judged by
the code that judges a study, and counts. Takes about a minute on one core.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from analysis.best import compare_with_best
from analysis.contrasts import judge_effect
from analysis.metrics import Values, metric_named
from analysis.replicates import Replicates
from jobs.design import detectable

PERPLEXITY = metric_named("perplexity")


class Spreads(NamedTuple):
    """Standard deviations of a contrast, in logarithms of perplexity."""

    model: float = 0.02
    draw: float = 0.01
    """Of the effect between draws of calibration data."""
    window: float = 0.1
    """Of the effect between windows, which models share."""
    rest: float = 0.1
    """Of a window in one model and draw."""


class Layout(NamedTuple):
    """How many replicates there are."""

    models: int = 8
    draws: int = 2
    windows: int = 64
    crossed: bool = False
    """Whether models share draws."""


class Case(NamedTuple):
    """A statement: a share lies between `low` and `high`."""

    low: float
    high: float
    measure: Callable[[int], float]
    """The share, in a number of simulated data sets."""

    @property
    def stated(self) -> str:
        """The statement in words."""
        if self.low == self.high:
            return f"{100 * self.low:g} %"
        more = self.high == 1
        return f"{100 * (self.low if more else self.high):g} % or {'more' if more else 'less'}"


def error(share: float, runs: int) -> float:
    """Return the standard error of a share."""
    return float(np.sqrt(share * (1 - share) / runs))


def draw(
    chance: np.random.Generator, layout: Layout, spreads: Spreads, effect: float
) -> Replicates:
    """Return simulated differences with a planted effect, in logarithms of perplexity."""
    models, draws, windows, crossed = layout
    numbers = (
        effect
        + chance.normal(0, spreads.model, (models, 1, 1))
        + chance.normal(0, spreads.draw, (1 if crossed else models, draws, 1))
        + chance.normal(0, spreads.window, (1, 1, windows))
        + chance.normal(0, spreads.rest, (models, draws, windows))
    )
    return Replicates(np.asarray(numbers.mean(axis=2)), crossed, (np.asarray(numbers),))


def coverage(runs: int, layout: Layout, spreads: Spreads, windows_known: bool = True) -> float:
    """Return how often the 95 % interval holds the planted effect."""
    chance = np.random.default_rng(0)
    effect, held = 0.03, 0
    for _ in range(runs):
        data = draw(chance, layout, spreads, effect)
        found = judge_effect(data if windows_known else data._replace(windows=()), PERPLEXITY, 1.0)
        held += found.low <= 100 * np.expm1(effect) <= found.high
    return held / runs


def false_claims(runs: int, contrasts: int, layout: Layout, spreads: Spreads) -> float:
    """Return how often one or more contrasts of arms that are all equal are called better or worse.

    Each arm is compared with the same control, as in a study.
    """
    chance = np.random.default_rng(1)
    wrong = 0
    for _ in range(runs):
        control, *arms = (draw(chance, layout, spreads, 0.0) for _ in range(contrasts + 1))
        verdicts = {
            judge_effect(arm.minus(control), PERPLEXITY, 1e-6, contrasts).verdict for arm in arms
        }
        wrong += bool(verdicts & {"better", "worse"})
    return wrong / runs


def false_equivalence(runs: int, layout: Layout, spreads: Spreads, smallest: float) -> float:
    """Return how often an effect of exactly the smallest size of interest is called equivalent."""
    chance = np.random.default_rng(2)
    effect = PERPLEXITY.difference(smallest)
    found = (
        judge_effect(draw(chance, layout, spreads, effect), PERPLEXITY, smallest)
        for _ in range(runs)
    )
    return sum(each.verdict == "equivalent" for each in found) / runs


def power(runs: int, layout: Layout, spread: float, family: int) -> float:
    """Return how often the effect that `plan` says is seen with 80 % power is claimed.

    Args:
        runs: simulated data sets.
        layout: the replicates.
        spread: standard deviation between models, in percent of perplexity.
        family: contrasts that are corrected together.
    """
    chance = np.random.default_rng(3)
    effect = PERPLEXITY.difference(detectable("perplexity", spread, layout.models, family))
    spreads = Spreads(PERPLEXITY.difference(spread), 0.0, 0.0, 0.0)
    claimed = 0
    for _ in range(runs):
        data = draw(chance, layout, spreads, effect)._replace(windows=())
        claimed += judge_effect(data, PERPLEXITY, 1e-6, family).verdict == "worse"
    return claimed / runs


def best_in_set(runs: int, levels: Values, layout: Layout, spreads: Spreads) -> float:
    """Return how often the candidate with the lowest true level is in the set of possible best."""
    chance = np.random.default_rng(4)
    true = str(int(levels.argmin()))
    held = 0
    for _ in range(runs):
        scores = {
            str(place): draw(chance, layout, spreads, float(level))
            for place, level in enumerate(levels)
        }
        found = {each.name: each for each in compare_with_best(scores, PERPLEXITY)}
        held += found[true].possibly_best
    return held / runs


USUAL, FEW, ONE = Layout(), Layout(models=4), Layout(models=1, draws=4)
TWO, FOUR = Layout(crossed=True), Layout(draws=4, crossed=True)
PLAIN, ALIKE, DIFFERENT = Spreads(), Spreads(window=0.0), Spreads(window=0.4)
DRAWN, SMALL, UNVARIED = Spreads(draw=0.03), Spreads(0.01, 0.005, 0.02, 0.05), Spreads(model=0.0)
EQUAL = np.array([-1e-9, 0.0, 0.0, 0.0, 0.0, 0.0])
RIVAL = np.array([0.0, 1e-9, 1.0, 1.0, 1.0, 1.0])

CASES: dict[str, Case] = {
    "the 95 % interval holds the effect": Case(0.95, 1, lambda n: coverage(n, USUAL, PLAIN)),
    "... windows do not differ": Case(0.95, 1, lambda n: coverage(n, USUAL, ALIKE)),
    "... windows differ most": Case(0.95, 1, lambda n: coverage(n, USUAL, DIFFERENT)),
    "... the same, by t over models": Case(0, 0.9, lambda n: coverage(n, USUAL, DIFFERENT, False)),
    "... 4 models": Case(0.95, 1, lambda n: coverage(n, FEW, PLAIN)),
    "... crossed, 2 draws": Case(0.95, 1, lambda n: coverage(n, TWO, DRAWN)),
    "... crossed, 4 draws": Case(0.95, 1, lambda n: coverage(n, FOUR, DRAWN)),
    "... 1 model, 4 draws": Case(0.95, 1, lambda n: coverage(n, ONE, UNVARIED)),
    "of 5 equal arms one is claimed": Case(0, 0.05, lambda n: false_claims(n, 5, USUAL, PLAIN)),
    "the smallest effect of interest is called equivalent": Case(
        0, 0.025, lambda n: false_equivalence(n, USUAL, SMALL, 2.0)
    ),
    "the effect that `plan` names is claimed": Case(0.8, 0.8, lambda n: power(n, USUAL, 2.0, 1)),
    "... one of 5 contrasts": Case(0.8, 0.8, lambda n: power(n, USUAL, 2.0, 5)),
    "... with 4 models": Case(0.8, 0.8, lambda n: power(n, FEW, 2.0, 1)),
    "of 6 equal arms the best is in the set": Case(
        0.95, 1, lambda n: best_in_set(n, EQUAL, USUAL, PLAIN)
    ),
    "... with one rival": Case(0.95, 1, lambda n: best_in_set(n, RIVAL, USUAL, PLAIN)),
}
"""Statements, in the order of the table."""


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000, help="simulated data sets per line")
    runs = parser.parse_args().runs
    print("| simulated: 8 models x 2 draws, unless said | share | stated |\n|---|---|---|")
    for name, case in CASES.items():
        share = case.measure(runs)
        shown = f"{100 * share:.1f} ± {200 * error(share, runs):.1f} %"
        print(f"| {name} | {shown} | {case.stated} |")


if __name__ == "__main__":
    main()
