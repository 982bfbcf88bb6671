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

from fxgrow.labels.forest import Forest, IntArray, Union, components, distinct


@dataclass(frozen=True)
class Rows:
    """The rows of all channels, each known by its smallest label.

    Attributes:
        of_label: for each label its row.
        constraints: where rows of one channel that are not one met: both sides and the place.
    """

    of_label: IntArray
    constraints: tuple[Union, ...] = ()


def rows_of(starts: IntArray, channel: IntArray, unions: Sequence[Union]) -> Rows:
    """Return the rows of channels.

    Args:
        starts: the first label of each axis, ascending; every label belongs to an axis but 0.
        channel: the smallest label of each label's channel.
        unions: the calls that made these channels, in order. One that would join two rows of one
            axis joins none.
    """
    axis = np.searchsorted(starts, np.arange(len(channel)), side="right")
    order = np.lexsort((axis, channel))
    again = (np.diff(channel[order]) == 0) & (np.diff(axis[order]) == 0)
    if not again.any():
        return Rows(channel)
    several = np.zeros(len(channel), dtype=bool)
    several[channel[order][1:][again]] = True
    several = several[channel]
    # Labels of which their channel has more on the same axis, those of each channel side by side.
    several_rows = order[np.append(again, False) | np.append(False, again)]
    begins = np.searchsorted(channel[several_rows], np.arange(len(channel) + 1))
    forest, constraints = Forest(len(channel)), list[Union]()
    for left, right, place in unions:
        wanted = several[left]
        if not wanted.any():
            continue
        pairs = distinct(left[wanted].astype(np.int64) * len(channel) + right[wanted])
        left, right = pairs // len(channel), pairs % len(channel)
        one, other = forest.find(left), forest.find(right)
        apart = one != other
        if not apart.any():
            continue
        one, other = one[apart], other[apart]
        members = several_rows[_ranges(begins, np.unique(channel[one]))]
        rows, index = np.unique([one, other], return_inverse=True)
        joined = rows[components(len(rows), [(*index.reshape(2, -1), "")])]
        before = forest.find(members)
        found = np.minimum(np.searchsorted(rows, before), len(rows) - 1)
        after = np.where(rows[found] == before, joined[found], before)
        keys = np.sort(after * (len(starts) + 1) + axis[members])
        if (keys[1:] == keys[:-1]).any():
            constraints.append((left, right, place))
        else:
            forest.join([(one, other, "")])
    row = np.where(several, forest.roots(), channel)
    return Rows(row, tuple((row[left], row[right], place) for left, right, place in constraints))


def _ranges(begins: IntArray, some: IntArray) -> npt.NDArray[np.int64]:
    """Return the numbers from ``begins[i]`` to before ``begins[i + 1]`` for some i, in order."""
    lengths = begins[some + 1] - begins[some]
    skipped: IntArray = np.repeat(begins[some] - np.cumsum(lengths) + lengths, lengths)
    return skipped + np.arange(len(skipped))
