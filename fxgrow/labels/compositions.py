"""Which axes make a weight together: two parameters in a sum, one times another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


@dataclass
class Compositions:
    """Which axes have to be what another one is, and which only accompany it.

    Attributes:
        others: by the index of an axis, those it makes a weight with, and whether these are alike:
            the weight is linear in both together.
    """

    others: dict[int, dict[int, bool]] = field(default_factory=dict)

    def record(self, pairs: Iterable[tuple[int, int]], *, alike: bool) -> None:
        """Record of pairs of axes that the second is as the first, or accompanies it."""
        for first, second in pairs:
            if first >= 0 <= second and first != second:
                self.others.setdefault(first, {}).setdefault(second, alike)
                if alike:
                    self.others.setdefault(second, {}).setdefault(first, alike)

    def with_others(self, axes: Iterable[int]) -> Iterator[tuple[int, bool]]:
        """Yield axes and all that make weights with them, and whether each is what they are."""
        waiting = [(axis, True) for axis in axes]
        if not self.others:
            yield from waiting
            return
        seen = set()
        while waiting:
            item = waiting.pop(0)
            if item not in seen:
                seen.add(item)
                yield item
                found = self.others.get(item[0], {}).items()
                waiting += [(axis, alike and item[1]) for axis, alike in found]
