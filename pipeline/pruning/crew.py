"""Several processes on one walk through a model.

All hold the same decoder layer. Each passes some groups of windows through it, and each prunes some
of its matrices. The first process leads: it restores, visits and stores. The others, its helpers,
send each other the sums that they need for the matrices that they prune, and what they made of
these. No result depends on their number.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipeline.models.matrices import Matrix
from pipeline.pruning.changes import Change, apply_change, change_of, zeros_of
from pipeline.pruning.groups import Share, Sums, parts_of, total
from pipeline.pruning.pruners.base import Pruned
from pipeline.stage import NO_HELPERS, Helpers


@dataclass
class Crew:
    """This process, which leads, and its helpers; for one walk."""

    groups: int = 1
    """Into which the windows are split."""

    helpers: Helpers = NO_HELPERS
    """Each has made a `Helper`."""

    spread: bool = False
    """Whether helpers prune matrices too; else they only observe inputs."""

    masks: bool = False
    """Whether pruning only chooses what to zero."""

    _owners: list[list[str]] = field(default_factory=list)
    _observed: list[list[Any]] = field(default_factory=list)
    _pruned: list[list[Any]] = field(default_factory=list)
    _advanced: list[Any] = field(default_factory=list)

    @property
    def share(self) -> Share:
        """The groups of this process."""
        return Share(self.groups, 0, 1 + self.helpers.count)

    def observe(self, number: int, found: Sequence[Matrix]) -> None:
        """Let the helpers observe the inputs of a decoder layer's matrices."""
        members = self.share.members
        self._owners = _owners(found, members if self.spread else 1, self.masks)
        self._owners += [[] for _ in range(members - len(self._owners))]
        self._wait()
        self._observed = [
            self.helpers.call(helper, "observe", number, self._owners, returns=members)
            for helper in range(self.helpers.count)
        ]

    def hand_over(self, number: int, found: Sequence[Matrix], own: Sums) -> None:
        """Give matrices their statistics, but let the helpers prune some; those have `elsewhere`.

        Args:
            own: the sums over the groups of this process.
        """
        owners = self._owners if self.spread else self._owners[:1]
        ours, *theirs = [self._added(own, owner) for owner in range(len(owners))]
        self._pruned = [  # once all sums are under way: a helper does one thing after the other
            self.helpers.call(helper, "prune", number, owners[helper + 1], *sums, returns=2)
            for helper, sums in enumerate(theirs)
        ]
        here = [each if isinstance(each, dict) else self.helpers.value(each) for each in ours]
        whole = total(here, self.groups)
        whole.hand_over([matrix for matrix in found if matrix.name in self._owners[0]])
        for helper, names in enumerate(self._owners[1:]):
            for matrix in found:
                if matrix.name in names:
                    matrix.elsewhere = partial(self._take, helper, matrix)

    def advance(self, number: int, found: Sequence[Matrix]) -> None:
        """Let the helpers advance, with the matrices as the walk leaves them."""
        own = [matrix for matrix in found if matrix.elsewhere is None]
        changed = self.spread and self.helpers.count
        changes = {each.name: self._change(each) for each in own} if changed else {}
        for helper in range(self.helpers.count):
            others = [sent[0] for place, sent in enumerate(self._pruned) if place != helper]
            self._advanced.append(self.helpers.call(helper, "advance", number, changes, *others))
        self._pruned = []

    def _added(self, own: Sums, owner: int) -> list[Any]:
        """Return two promises or values whose sum an owner needs.

        Helpers add them in pairs, so that nobody receives what all the others have: a Hessian of a
        large model takes gigabytes.
        """
        held = [(0, parts_of(own, self._owners[owner]))]
        held += [(place, each[owner]) for place, each in enumerate(self._observed, start=1)]
        while len(held) > 2:
            pairs = [held[place : place + 2] for place in range(0, len(held), 2)]
            held = [
                (pair[-1][0], self.helpers.call(pair[1][0] - 1, "add", pair[0][1], pair[1][1]))
                if len(pair) == 2
                else pair[0]
                for pair in pairs
            ]
        return [each for _, each in held]

    def _wait(self) -> None:
        for promise in self._advanced:
            self.helpers.value(promise)
        self._advanced = []

    def _take(self, helper: int, matrix: Matrix) -> Pruned:
        """Wait for what a helper made of a matrix, and make the same of it here."""
        changes, records = map(self.helpers.value, self._pruned[helper])
        facts, permutation = records[matrix.name]
        mask = apply_change(matrix.weight, changes[matrix.name], self.masks)
        return Pruned(mask, permutation=permutation, facts=facts)

    def _change(self, matrix: Matrix) -> Change:
        return change_of(matrix.weight, zeros_of(matrix.weight), self.masks)


def _owners(found: Sequence[Matrix], members: int, masks: bool) -> list[list[str]]:
    """Spread matrices over processes, the longest work first to the one with the least so far."""
    work = [0] * members
    owners: list[list[str]] = [[] for _ in range(members)]
    costs = {matrix.name: _cost(matrix, masks) for matrix in found}
    for name in sorted(costs, key=lambda name: -costs[name]):
        least = work.index(min(work))
        work[least] += costs[name]
        owners[least].append(name)
    return owners


def _cost(matrix: Matrix, masks: bool) -> int:
    """Return the operations that pruning takes: weights that change need a Hessian's inverse."""
    rows, columns = matrix.weight.shape
    return rows * columns if masks else (rows + columns) * columns**2
