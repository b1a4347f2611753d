"""Random choices, from one stream for each document."""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

_Item = TypeVar("_Item")


class Draws:
    """Choices from a random stream that a name fixes: equal names give equal choices."""

    def __init__(self, *name: object) -> None:
        digest = hashlib.sha256("/".join(map(str, name)).encode()).digest()
        self._generator = np.random.Generator(
            np.random.Philox(key=int.from_bytes(digest[:16], "little"))
        )

    def share(self) -> float:
        """Return a number in [0, 1)."""
        return float(self._generator.random())

    def number(self, low: int, high: int) -> int:
        """Return an integer from `low` to `high`, both included."""
        return low + int(self._generator.random() * (high - low + 1))

    def pick(self, items: Sequence[_Item]) -> _Item:
        """Return one of the items."""
        return items[int(self._generator.random() * len(items))]

    def several(self, items: Sequence[_Item], count: int) -> list[_Item]:
        """Return `count` different items in random order."""
        return [items[place] for place in self._generator.permutation(len(items))[:count]]

    def shuffled(self, items: Sequence[_Item]) -> list[_Item]:
        """Return all items in random order."""
        return self.several(items, len(items))

    def balanced(self, items: Sequence[_Item], count: int) -> list[_Item]:
        """Return `count` items in random order, each equally often or once more."""
        rounds = -(-count // len(items))
        drawn = [item for _ in range(rounds) for item in self.shuffled(items)]
        return self.shuffled(drawn[:count])
