"""What calprune wants to reach. Timings fail no test: a target that is missed is only shown."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.geometry import MIDDLE, TESTBED
from benchmarks.measure import MaskRow, PrunerRow

SPEED = {
    (TESTBED.name, "wanda"): 3.0,
    (TESTBED.name, "sparsegpt"): 3.0,
    (TESTBED.name, "dsnot"): 3.0,
    (MIDDLE.name, "wanda"): 1.2,
    (MIDDLE.name, "sparsegpt"): 1.5,
}
"""By geometry and pruner, how many times faster than the plain implementation."""

FLOOR = {(MIDDLE.name, "wanda"): 0.6}
"""By geometry and pruner, the share of the floor."""

MASKS = 10.0
"""How many times faster an N:M mask is chosen than by the loop."""


@dataclass(frozen=True)
class Target:
    """A number to reach."""

    what: str
    wanted: float | None
    """None where the number is only shown."""
    reached: float
    at_most: bool = False
    """Whether lower is better."""

    @property
    def met(self) -> bool | None:
        """Whether it is reached; None where nothing is wanted."""
        if self.wanted is None:
            return None
        return self.reached <= self.wanted if self.at_most else self.reached >= self.wanted


def targets(pruners: Sequence[PrunerRow], masks: Sequence[MaskRow]) -> list[Target]:
    """The targets for what was measured."""
    found = []
    for row in pruners:
        key = (row.geometry, row.pruner)
        if key in SPEED and row.ratio is not None:
            found.append(Target(f"{' '.join(key)}: times plain", SPEED[key], row.ratio))
        if key in FLOOR:
            found.append(Target(f"{' '.join(key)}: share of floor", FLOOR[key], row.floor_share))
    found += [
        Target(f"mask {row.rows} x {row.columns}: times loop", MASKS, row.ratio) for row in masks
    ]
    return found
