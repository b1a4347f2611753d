"""Groups of calibration windows, and sums over them.

The windows are split into groups, and the sums over groups are added in the order of a fixed binary
tree. So the statistics have the same bits whichever process takes which groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pipeline.pruning.observed_inputs import InputSums

Span = tuple[int, int]
"""The first group of some adjacent ones, and the one after the last."""

Sums = dict[Span, InputSums]
"""Sums over groups, by span."""


@dataclass(frozen=True)
class Share:
    """The groups that one of several processes takes."""

    groups: int = 1
    """Of the whole calibration set."""

    member: int = 0
    """The number of the process."""

    members: int = 1
    """How many processes there are."""

    @property
    def own(self) -> range:
        """The numbers of its groups."""
        return _part(self.groups, self.member, self.members)

    def windows(self, windows: Tensor, group: int) -> Tensor:
        """Return the windows `[nsamples, seqlen]` of a group."""
        part = _part(len(windows), group, self.groups)
        return windows[part.start : part.stop]


def _part(whole: int, number: int, parts: int) -> range:
    return range(number * whole // parts, (number + 1) * whole // parts)


def total(parts: Sequence[Sums], groups: int) -> InputSums:
    """Return the sum over all groups, of which every process had some.

    The parts must not be used afterwards.
    """
    sums: Sums = {}
    for part in parts:
        sums |= part
    whole = merge(sums, 0, groups)
    assert whole, f"of {groups} groups only {sorted(sums)} have sums"
    return sums[0, groups]


def parts_of(sums: Sums, names: Sequence[str]) -> Sums:
    """Return the part of the sums that these matrices need."""
    return {span: each.of(names) for span, each in sums.items()}


def merge(sums: Sums, first: int, end: int) -> bool:
    """Merge the sums below one node of the tree, as far as they are there.

    Args:
        first: the first group of the node. Its branches are the two halves; the right one has the
            odd group.
        end: the one after the last.

    Returns:
        Whether the sum of the whole node is there.
    """
    if (first, end) in sums:
        return True
    if end - first == 1:
        return False
    middle = (first + end) // 2
    branches = (merge(sums, first, middle), merge(sums, middle, end))
    if not all(branches):
        return False
    left, right = sums.pop((first, middle)), sums.pop((middle, end))
    left.merge(right)
    sums[first, end] = left
    return True
