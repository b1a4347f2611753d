"""DSnoT on a single row, in plain Python and float64, decision by decision.

It shows how close a row's closest decision was. Where the masks of two float32 implementations
differ, that decision must have been near a tie.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.baseline.dsnot import CYCLES, THRESHOLD


@dataclass
class Replay:
    """A row's mask, and the smallest relative difference that decided a swap."""

    zeroed: set[int]
    closest: float = field(default=float("inf"))

    def compare(self, one: float, other: float, scale: float | None = None) -> bool:
        """Return whether one < other, and note how close they are."""
        size = scale or max(abs(one), abs(other))
        if size:
            self.closest = min(self.closest, abs(one - other) / size)
        return one < other


def replay(
    scores: Sequence[float],
    contributions: Sequence[float],
    variances: Sequence[float],
    zeros: int,
    pattern: tuple[int, int] | None,
) -> Replay:
    """Run DSnoT on one row.

    Args:
        scores: Wanda's; they choose the initial mask and which weight a swap zeroes.
        contributions: g_j = W_j m_j.
        variances: of the inputs.
        zeros: weights of the row to zero if there is no pattern.
        pattern: kept and group size.
    """
    columns = range(len(scores))
    size = pattern[1] if pattern else len(scores)
    row = Replay(set())
    for start in range(0, len(scores), size):
        ranked = sorted(columns[start : start + size], key=lambda column: scores[column])
        count = size - pattern[0] if pattern else zeros
        row.zeroed.update(ranked[:count])
        if 0 < count < size:
            row.compare(scores[ranked[count - 1]], scores[ranked[count]])
    error = sum(contributions[column] for column in row.zeroed)
    scale = sum(abs(contributions[column]) for column in row.zeroed)
    positive = error > 0
    candidates = set(row.zeroed)  # each may come back once
    protected: set[int] = set()
    for _ in range(CYCLES):
        if not row.compare(THRESHOLD, abs(error), scale):
            break
        sign = 1 if error > 0 else -1
        helpful = [column for column in candidates if sign * contributions[column] > 0]
        if not helpful:
            break
        grown = _best(row, helpful, [-sign * contributions[j] / variances[j] for j in helpful])
        start = grown // size * size
        losable = [
            column
            for column in columns[start : start + size]
            if column not in row.zeroed | protected
            and (pattern or sign * contributions[column] < 0)
        ]
        if not losable:
            break
        lost = _best(row, losable, [scores[column] for column in losable])
        changed = error + contributions[lost] - contributions[grown]
        if pattern and row.compare(changed, 0, scale) == positive:
            break
        error = changed
        row.zeroed ^= {grown, lost}
        candidates.discard(grown)
        protected.add(grown)
    return row


def _best(row: Replay, choices: Sequence[int], costs: Sequence[float]) -> int:
    """Return the choice of least cost."""
    ranked = sorted(zip(costs, choices, strict=True))
    if len(ranked) > 1:
        row.compare(ranked[0][0], ranked[1][0])
    return ranked[0][1]
