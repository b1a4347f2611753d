"""Random choices of one document, each from a stream of its own."""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")


class Draws:
    """Choices from the stream that a name fixes: equal names, equal choices, in any order."""

    def __init__(self, *name: object) -> None:
        digest = hashlib.sha256("/".join(map(str, name)).encode()).digest()
        self._generator = np.random.Generator(
            np.random.Philox(key=int.from_bytes(digest[:16], "little"))
        )

    def share(self) -> float:
        """A number in [0, 1)."""
        return float(self._generator.random())

    def number(self, low: int, high: int) -> int:
        """An integer from `low` to `high`, both included."""
        return low + int(self._generator.random() * (high - low + 1))

    def pick(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[int(self._generator.random() * len(items))]

    def several(self, items: Sequence[Item], count: int) -> list[Item]:
        """Different items, in random order."""
        return [items[place] for place in self._generator.permutation(len(items))[:count]]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """All items, in random order."""
        return self.several(items, len(items))

    def balanced(self, items: Sequence[Item], count: int) -> list[Item]:
        """`count` items of which each appears equally often, give or take one, in random order."""
        rounds = -(-count // len(items))
        drawn = [item for _ in range(rounds) for item in self.shuffled(items)]
        return self.shuffled(drawn[:count])
