"""What new channels hold, as a pairing lays them out: tied ones together, and cell by cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fxgrow.channels.channels import Channels
from fxgrow.grow.match.hashes import mix
from fxgrow.grow.match.tied import Tied
from fxgrow.grow.obstacle import Obstacle
from fxgrow.labels.forest import IntArray
from fxgrow.plan.pairing import Layout, Pairing


@dataclass
class Assignment:
    """What the channels of a network hold that continue no old one.

    Attributes:
        tied: which channels of the network go together.
        draw, sign, copy, row, padding: as :class:`fxgrow.grow.match.match.Matching` has them.
        drawn: number of values drawn so far.
    """

    tied: Tied
    draw: IntArray
    sign: IntArray
    copy: IntArray
    padding: npt.NDArray[np.bool_]
    row: IntArray
    drawn: int = 0

    @classmethod
    def empty(cls, tied: Tied) -> Assignment:
        """Return that of a network in which every channel continues an old one."""
        nothing = np.full(len(tied.first), -1, dtype=np.int64)
        zero_channels = np.zeros(len(nothing), dtype=bool)
        signs, copies, rows = np.zeros_like(nothing), nothing.copy(), nothing.copy()
        return cls(tied, nothing, signs, copies, zero_channels, rows)

    def copy_whole(self, fresh: IntArray, kept: IntArray, times: int) -> IntArray:
        """Let the first of new channels be copies of all old ones; return the padding that is left.

        Args:
            fresh: the new channels of one kind.
            kept: the old ones.
            times: how many of each old one there are to be; 0 where none are copied.
        """
        if not times:
            return fresh
        copies, padding = np.split(fresh, [(times - 1) * len(kept)])
        self.copy[copies] = np.tile(kept, times - 1)
        self.padding[padding] = True
        return padding

    def lay_out(self, fresh: IntArray, kept: IntArray, pairing: Pairing, name: str) -> None:
        """Lay out new tied channels of one kind.

        Twins are tied channels. Of an odd number the last have none: its channels are twins where
        they are in the same groups. Two alone are not: a norm over them would divide by the root
        of their variance, which is zero where there is no space.

        Args:
            fresh: the first of each new tied channels.
            kept: the old tied channels of that kind; shape (number, size).
            pairing: says what they are.
            name: what its chance depends on.
        """
        members = self.tied.members(fresh)
        layout = pairing(len(members), len(kept), name)
        if layout.copies:
            self.copy[members] = kept[list(layout.copies)]
            return
        paired = len(members) - len(members) % 2 if members.shape[1] > 1 else len(members)
        layout = pairing(paired, len(kept), name)
        if layout.row_copies:
            self.row[members[:paired]] = kept[list(layout.row_copies)]
        self._draw(members[:paired], layout)
        for channels in members[paired:]:
            _, cells = np.unique(self.tied.cell[channels], return_inverse=True)
            for cell in range(int(cells.max()) + 1):
                inside = channels[cells == cell, None]
                for part in [inside] if len(inside) > 2 else inside[:, None]:
                    self._draw(part, pairing(len(part), len(kept), name))

    def _draw(self, members: IntArray, layout: Layout) -> None:
        """Let new tied channels hold what a layout has them draw."""
        if not len(members):
            return
        size = members.shape[1]
        draws = np.asarray(layout.draws)[:, None] * size + np.arange(size)
        self.draw[members] = self.drawn + draws
        self.sign[members] = np.asarray(layout.column_signs)[:, None]
        self.padding[members] |= layout.writes_zeros
        self.drawn += int(draws.max()) + 1


def check_order(
    old: Channels, new: Channels, grown: Sequence[int], continued: IntArray
) -> Obstacle | None:
    """Return what is in the way if groups of convolutions that get new ones lose their order.

    Their columns stay where they are; a shuffle before them may ask for something else.

    Args:
        old: the channels at the old sizes.
        new: those at the new ones.
        grown: the new axes of grouped convolutions that get new groups.
        continued: the old channel that each new one continues, or -1.
    """
    places = {(axis.tensor, axis.dim): index for index, axis in enumerate(old.axes)}
    for place in grown:
        axis = new.axes[place]
        if axis.groups == 1:
            continue
        count = old.convolution_groups[axis.tensor]
        before = old.of_axis(places[axis.tensor, axis.dim]).reshape(count, -1)
        now = continued[new.of_axis(place)].reshape(axis.groups, -1)[:count]
        if not np.array_equal(before, now):
            return Obstacle(
                f"at this width, the groups of {axis.tensor} would not find what they read in the "
                "order of their columns"
            )
    return None


def check_copies(
    old: Channels, new: Channels, copied: IntArray, continued: IntArray, copy: IntArray
) -> Obstacle | None:
    """Return what is in the way of copying channels as often as all others of their norm.

    Args:
        old: the channels at the old sizes.
        new: those at the new ones.
        copied: old channels that can only be copied, and not in part.
        continued: the old channel that each new one continues, or -1.
        copy: the old channel that each new one copies, or -1.
    """
    if not len(copied) or len(old.mixers) != len(new.mixers):
        return None
    origin = np.append(np.where(continued >= 0, continued, copy), -1)
    for before, after in zip(old.mixers, new.mixers, strict=True):
        was = before.channels[before.channels >= 0]
        if not np.isin(was, copied).any():
            continue
        is_now = origin[after.channels[after.channels >= 0]]
        counts = [np.bincount(x[x >= 0], minlength=old.count) for x in (was, is_now)]
        if (is_now < 0).any() or (counts[1] * len(was) != counts[0] * len(is_now)).any():
            return Obstacle(
                "at this width, what else the channels pass makes new ones that are copies of "
                f"none, or not of all alike, and {before.place} would notice",
                way_out="Try a multiple of the width.",
            )
    return None


def part_twins(
    channels: Channels, grown: Sequence[int], continued: IntArray, assignment: Assignment
) -> None:
    """Have twins read by zeros whose values may differ, in place.

    Twins that new groups of a convolution write are equal if what these groups read is, and of
    tied channels all depend on all.

    Args:
        channels: of the network at its new sizes.
        grown: the axes of grouped convolutions that get new groups.
        continued: the old channel that each one continues, or -1.
        assignment: what the others hold.
    """
    inputs = {channels.axes[i].tensor: i for i in grown if channels.axes[i].groups > 1}
    outputs = {channels.axes[i].tensor: i for i in grown if channels.axes[i].groups == 1}
    if not inputs:
        return
    first = assignment.tied.first
    origin = np.where(assignment.copy >= 0, assignment.copy, continued)
    value = np.where(assignment.draw >= 0, assignment.draw, assignment.drawn + origin)
    count = -1
    while count < (count := len(np.unique(value))):
        for weight, axis in inputs.items():
            groups = channels.convolution_groups[weight]
            read = value[channels.of_axis(axis)].reshape(groups, -1)
            written = channels.of_axis(outputs[weight]).reshape(groups, -1)
            kinds = np.full_like(value, -1)
            kinds[written] = np.unique(read, axis=0, return_inverse=True)[1].reshape(-1, 1)
            value = _finer(value, kinds)
        together = np.zeros(len(value), dtype=np.uint64)
        np.add.at(together, first, mix(value.astype(np.uint64)))
        value = _finer(value, np.unique(together[first], return_inverse=True)[1])
    draws, counts = np.unique(np.unique([assignment.draw, value], axis=1)[0], return_counts=True)
    assignment.sign[np.isin(assignment.draw, draws[counts > 1])] = 0


def _finer(value: IntArray, kind: IntArray) -> IntArray:
    """Return numbers that are equal where values are equal and of one kind."""
    found: IntArray = np.unique([value, kind], axis=1, return_inverse=True)[1].ravel()
    return found
