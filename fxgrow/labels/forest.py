"""Which numbers are joined: connected components, worked out as far as they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

IntArray: TypeAlias = npt.NDArray[np.int64]
Union: TypeAlias = tuple[IntArray, IntArray, str]  # labels, labels, place


class Forest:
    """The numbers from 0 on, each with a smaller one that it is joined with, or itself.

    Components by hooking and pointer jumping: a logarithmic number of passes over what is joined
    or asked for, none of them a Python loop over numbers.
    """

    def __init__(self, count: int = 0) -> None:
        self._parent = np.arange(count, dtype=np.int64)

    def grow(self, count: int) -> None:
        """Have at least so many numbers."""
        if count > len(self._parent):
            more = np.arange(len(self._parent), count, dtype=np.int64)
            self._parent = np.concatenate([self._parent, more])

    def join(self, unions: Sequence[Union]) -> None:
        """Join the numbers that stand in one place of the two sides of some unions."""
        if not unions:
            return
        left = self.find(np.concatenate([side for side, _, _ in unions]))
        right = self.find(np.concatenate([side for _, side, _ in unions]))
        while (apart := left != right).any():
            left, right = left[apart], right[apart]
            np.minimum.at(self._parent, np.maximum(left, right), np.minimum(left, right))
            left, right = self.find(left), self.find(right)

    def find(self, numbers: IntArray) -> IntArray:
        """Return, for each number, the smallest that it is joined with."""
        found = self._parent[numbers]
        while not np.array_equal(further := self._parent[found], found):
            found = further
        self._parent[numbers] = found
        return found

    def roots(self) -> IntArray:
        """Return, for every number, the smallest that it is joined with."""
        return self.find(np.arange(len(self._parent)))


def components(count: int, unions: Sequence[Union]) -> IntArray:
    """Return, for each of ``count`` numbers, the smallest that some unions join it with."""
    forest = Forest(count)
    forest.join(unions)
    return forest.roots()


def distinct(numbers: IntArray) -> IntArray:
    """Return each of some numbers once, in an order that they alone decide.

    Sorting takes ten times as long where most are repeated: here each goes to a slot by its hash,
    and those that find another one there try again.
    """
    found = []
    size = max(16, 2 * len(numbers))
    while len(numbers):
        slot = (numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(20)) % size
        table, taken = np.empty(size, dtype=np.int64), np.zeros(size, dtype=bool)
        table[slot], taken[slot] = numbers, True
        found.append(table[taken])
        numbers = numbers[table[slot] != numbers]
    return np.concatenate(found) if found else numbers
