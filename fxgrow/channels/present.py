"""The channels that a network has, of those that were followed.

A layer of no channel or of one is followed at another width, where its channels are told from what
is broadcast (:mod:`fxgrow.grow.sizes.narrow`). What is planned is for those that are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fxgrow.channels.channels import Channels
from fxgrow.channels.groups import ChannelGroup
from fxgrow.labels.forest import IntArray


@dataclass(frozen=True)
class Present:
    """Channels without those that the network does not have.

    Attributes:
        channels: the others, with the positions that they have in the network's own tensors.
        number: for each channel that was followed its number among these, -1 where it has none;
            one entry more, for what is no channel (-1).
    """

    channels: Channels
    number: IntArray

    def numbers(self, some: IntArray) -> IntArray:
        """Return the numbers of some channels, those alone that are there."""
        found = self.number[some]
        return found[found >= 0]


def present(channels: Channels, groups: Sequence[ChannelGroup]) -> Present:
    """Return the channels that a network has, of those that were followed.

    Args:
        channels: as they were followed.
        groups: all channel groups, which tell what is absent.
    """
    absent = np.zeros(channels.count, dtype=bool)
    for group in groups:
        absent[group.absent] = True
    return without(channels, absent)


def without(channels: Channels, absent: npt.NDArray[np.bool_]) -> Present:
    """Return channels without some of them.

    Args:
        channels: as they were followed.
        absent: whether each is to be left out; shape (channels.count,).
    """
    if not absent.any():
        return Present(channels, np.append(np.arange(channels.count), -1))
    number = np.append(np.where(absent, -1, np.cumsum(~absent) - 1), -1)
    kept = ~absent[channels.channel]
    sums = np.concatenate([[0], np.cumsum(kept)])
    start = sums[channels.start].astype(np.int64)
    axes = tuple(
        replace(axis, size=size)
        for axis, size in zip(channels.axes, np.diff(start).tolist(), strict=True)
    )
    found = replace(
        channels,
        axes=axes,
        channel=number[channels.channel[kept]],
        start=start,
        count=int((~absent).sum()),
        pins={int(number[c]): pin for c, pin in channels.pins.items() if number[c] >= 0},
        channel_of_label=number[channels.channel_of_label],
        mixers=tuple(m._replace(channels=number[m.channels]) for m in channels.mixers),
        met=tuple((numbers, number[some]) for numbers, some in channels.met),
        labels=channels.label_of_row[kept],
    )
    return Present(found, number)
