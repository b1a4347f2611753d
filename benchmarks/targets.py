"""The targets of the benchmarks. No timing fails a test: a missed target is only shown."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.geometry import MIDDLE, TESTBED
from benchmarks.measure import MaskRow, PrunerRow

_SPEED = {
    (TESTBED.name, "wanda"): 3.0,
    (TESTBED.name, "sparsegpt"): 3.0,
    (TESTBED.name, "dsnot"): 3.0,
    (MIDDLE.name, "wanda"): 1.2,
    (MIDDLE.name, "sparsegpt"): 1.5,
}
"""Times the speed of the plain implementation, by geometry and pruner."""

_FLOOR = {(MIDDLE.name, "wanda"): 0.6}
"""Share of the floor, by geometry and pruner."""

_MASKS = 10.0
"""Times the speed of the loop that chooses an N:M mask."""


@dataclass(frozen=True)
class Target:
    """A number to reach."""

    what: str
    wanted: float | None
    """None if the number is only shown."""
    reached: float
    at_most: bool = False
    """Whether lower is better."""

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None if there is none."""
        if self.wanted is None:
            return None
        return self.reached <= self.wanted if self.at_most else self.reached >= self.wanted


def targets(pruners: Sequence[PrunerRow], masks: Sequence[MaskRow]) -> list[Target]:
    """Return the targets for these measurements."""
    found = []
    for row in pruners:
        key = (row.geometry, row.pruner)
        if key in _SPEED and row.ratio is not None:
            found.append(Target(f"{' '.join(key)}: times plain", _SPEED[key], row.ratio))
        if key in _FLOOR:
            found.append(Target(f"{' '.join(key)}: share of floor", _FLOOR[key], row.floor_share))
    found += [
        Target(f"mask {row.rows} x {row.columns}: times loop", _MASKS, row.ratio) for row in masks
    ]
    return found
