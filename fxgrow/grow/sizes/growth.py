"""How many positions become of what holds channels, counted in exact fractions.

What holds n rows of a group of width h holds n·h'/h of them afterwards: a concatenation adds its
groups up, a flatten multiplies by its spatial positions, and both come out of the count. So does a
shuffle, where only the sum over all groups must be whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm
from typing import Any

import numpy as np
import numpy.typing as npt

from fxgrow.channels.channels import Channels
from fxgrow.channels.groups import ChannelGroup, group_of_channel
from fxgrow.labels.forest import IntArray


@dataclass(frozen=True)
class Expansion:
    """What becomes of each channel.

    Attributes:
        parts: by channel, how many parts of a position it has afterwards where it had one position;
            one entry more, for what is no channel (-1).
        whole: how many parts make a position.
    """

    parts: npt.NDArray[Any]
    whole: int

    def positions(self, channels: IntArray) -> Fraction:
        """Return how many positions there are afterwards where each of some channels had one."""
        return Fraction(int(self.parts[channels].sum()), self.whole)

    def grows(self, channels: IntArray) -> bool:
        """Return whether there are more of any of some channels."""
        return bool((self.parts[channels] != self.whole).any())

    def among(self, known: Channels, others: Channels) -> Expansion:
        """Return the same for the channels of another run.

        Args:
            known: the channels that this is of.
            others: those of another run at the same sizes, which may know more axes.
        """
        index = {(axis.tensor, axis.dim): i for i, axis in enumerate(known.axes)}
        parts = np.full(others.count + 1, self.whole, dtype=self.parts.dtype)
        for place, axis in enumerate(others.axes):
            found = index.get((axis.tensor, axis.dim))
            rows = None if found is None else known.of_axis(found)
            if rows is not None and len(rows) == axis.size:
                mine = others.of_axis(place)
                parts[mine] = np.maximum(parts[mine], self.parts[rows])
        return replace(self, parts=parts)


def growth_of(
    channels: Channels, groups: Sequence[ChannelGroup], widths: Mapping[str, int]
) -> Expansion:
    """Return what becomes of channels whose groups get new widths, by name."""
    ratios = [group.ratio(widths) for group in groups]
    whole = lcm(*(ratio.denominator for ratio in ratios))
    parts = [int(ratio * whole) for ratio in ratios]
    most = max((*parts, whole)) * max(len(channels.channel), 1)  # more than any sum of them
    exact = np.asarray([*parts, whole], dtype=np.int64 if most < 2**63 else object)
    return Expansion(exact[group_of_channel(channels, groups)], whole)
