"""Which labels of one channel belong together, where a channel has several rows of one axis.

Two halves of a gate, the positions of a head and the places of a flattened map are rows of one
channel. Row by row they run through other axes beside their own: the biases, and whatever is added
to them. An operation that brings rows of one axis together (the gate itself, or a flatten, which
has each row at many positions) says no more than that they are one channel; every other tells which
row of one axis belongs to which of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fxgrow.labels.forest import IntArray, Union, components


@dataclass(frozen=True)
class Rows:
    """The rows of all channels, each known by its smallest label.

    Attributes:
        of_label: for each label its row.
        meetings: where rows of one channel that are not one met: both sides and the place.
    """

    of_label: IntArray
    meetings: tuple[Union, ...] = ()


def rows_of(starts: IntArray, channel: IntArray, unions: Sequence[Union]) -> Rows:
    """Return the rows of channels.

    Args:
        starts: the first label of each axis, ascending; every label belongs to an axis but 0.
        channel: the smallest label of each label's channel.
        unions: the calls that made these channels, in order. One that would join two rows of one
            axis joins none.
    """
    everything = np.arange(len(channel))
    axis = np.searchsorted(starts, everything, side="right")
    order = np.lexsort((axis, channel))
    again = (np.diff(channel[order]) == 0) & (np.diff(axis[order]) == 0)
    several = np.zeros(len(channel), dtype=bool)
    several[channel[order][1:][again]] = True
    several = several[channel]
    row = np.where(several, everything, channel)
    if not again.any():
        return Rows(row)
    meetings: list[Union] = []
    # The labels of each channel that has several rows, side by side.
    labels = order[several[order]]
    begins = np.searchsorted(channel[labels], np.arange(len(channel) + 1))
    for left, right, place in unions:
        wanted = several[left]
        if not wanted.any():
            continue
        left, right = left[wanted], right[wanted]
        members = labels[_ranges(begins, np.unique(channel[left]))]
        kept, index = np.unique(row[members], return_inverse=True)
        pairs = (np.searchsorted(kept, row[left]), np.searchsorted(kept, row[right]), "")
        joined = components(len(kept), [pairs])[index]
        keys = np.sort(joined * (len(starts) + 1) + axis[members])
        if (keys[1:] == keys[:-1]).any():
            meetings.append((left, right, place))
        else:
            row[members] = kept[joined]
    return Rows(row, tuple((row[left], row[right], place) for left, right, place in meetings))


def _ranges(begins: IntArray, some: IntArray) -> npt.NDArray[np.int64]:
    """Return the numbers from ``begins[i]`` to before ``begins[i + 1]`` for some i, in order."""
    lengths = begins[some + 1] - begins[some]
    skipped: IntArray = np.repeat(begins[some] - np.cumsum(lengths) + lengths, lengths)
    return skipped + np.arange(len(skipped))
