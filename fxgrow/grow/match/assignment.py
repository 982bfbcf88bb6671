"""What new channels hold, as a pairing lays them out: bundle by bundle, and cell by cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fxgrow.channels.channels import Channels
from fxgrow.errors import PlanError
from fxgrow.grow.match.hashes import mix
from fxgrow.grow.match.tied import Bundles
from fxgrow.labels.forest import IntArray
from fxgrow.plan.pairing import Layout, Pairing


@dataclass
class Laid:
    """What the channels of a network hold that continue no old one.

    Attributes:
        bundles: those of the network.
        draw, sign, copy, surplus: as :class:`fxgrow.grow.match.match.Matching` has them.
        drawn: number of values drawn so far.
    """

    bundles: Bundles
    draw: IntArray
    sign: IntArray
    copy: IntArray
    surplus: npt.NDArray[np.bool_]
    drawn: int = 0

    @classmethod
    def empty(cls, bundles: Bundles) -> Laid:
        """Return that of a network in which every channel continues an old one."""
        nothing = np.full(len(bundles.first), -1, dtype=np.int64)
        silent = np.zeros(len(nothing), dtype=bool)
        return cls(bundles, nothing, np.zeros_like(nothing), nothing.copy(), silent)

    def lay_out(self, fresh: IntArray, kept: IntArray, pairing: Pairing, name: str) -> None:
        """Lay out new bundles of one kind.

        Twins are bundles. Of an odd number the last has none: its own channels are twins where
        they are in the same groups. Two alone are not: a norm over them would divide by the root
        of their variance, which is zero where there is no space.

        Args:
            fresh: the first channels of the new bundles.
            kept: the channels of the old bundles of that kind; shape (bundles, size).
            pairing: says what they are.
            name: what its chance depends on.
        """
        members = self.bundles.members(fresh)
        layout = pairing(len(members), len(kept), name)
        if layout.copies:
            self.copy[members] = kept[list(layout.copies)]
            return
        paired = len(members) - len(members) % 2 if members.shape[1] > 1 else len(members)
        self._draw(members[:paired], pairing(paired, len(kept), name))
        for channels in members[paired:]:
            _, cells = np.unique(self.bundles.cell[channels], return_inverse=True)
            for cell in range(int(cells.max()) + 1):
                inside = channels[cells == cell, None]
                for part in [inside] if len(inside) > 2 else inside[:, None]:
                    self._draw(part, pairing(len(part), len(kept), name))

    def _draw(self, members: IntArray, layout: Layout) -> None:
        """Let new bundles of some channels each hold what a layout has them draw."""
        if not len(members):
            return
        size = members.shape[1]
        draws = np.asarray(layout.draws)[:, None] * size + np.arange(size)
        self.draw[members] = self.drawn + draws
        self.sign[members] = np.asarray(layout.column_signs)[:, None]
        self.surplus[members] |= layout.silent
        self.drawn += int(draws.max()) + 1


def check_order(old: Channels, new: Channels, grown: Sequence[int], continued: IntArray) -> None:
    """Return if old groups of convolutions that get new ones find their channels in their order.

    Their columns stay where they are; a shuffle before them may ask for something else.

    Args:
        old: the channels at the old sizes.
        new: those at the new ones.
        grown: the new axes of grouped convolutions that get new groups.
        continued: the old channel that each new one continues, or -1.

    Raises:
        PlanError: they do not.
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
            raise PlanError(
                f"at this width, the groups of {axis.tensor} would not find what they read in the "
                "order of their columns."
            )


def check_copies(
    old: Channels, new: Channels, copied: IntArray, continued: IntArray, copy: IntArray
) -> None:
    """Return if every channel that can only be copied is, as often as all others of its norm.

    Args:
        old: the channels at the old sizes.
        new: those at the new ones.
        copied: old channels that can only be copied, and not in part.
        continued: the old channel that each new one continues, or -1.
        copy: the old channel that each new one copies, or -1.

    Raises:
        PlanError: a norm over them would change.
    """
    if not len(copied) or len(old.mixers) != len(new.mixers):
        return
    origin = np.append(np.where(continued >= 0, continued, copy), -1)
    for before, after in zip(old.mixers, new.mixers, strict=True):
        was = before.channels[before.channels >= 0]
        if not np.isin(was, copied).any():
            continue
        is_now = origin[after.channels[after.channels >= 0]]
        counts = [np.bincount(x[x >= 0], minlength=old.count) for x in (was, is_now)]
        if (is_now < 0).any() or (counts[1] * len(was) != counts[0] * len(is_now)).any():
            raise PlanError(
                "at this width, what else the channels pass makes new ones that are copies of "
                f"none, or not of all alike, and {before.place} would notice.",
                way_out="Try a multiple of the width.",
            )


def apart(channels: Channels, grown: Sequence[int], continued: IntArray, laid: Laid) -> None:
    """Have twins read by zeros whose values may differ, in place.

    Twins that new groups of a convolution write are equal if what these groups read is, and in a
    bundle all depends on all.

    Args:
        channels: of the network at its new sizes.
        grown: the axes of grouped convolutions that get new groups.
        continued: the old channel that each one continues, or -1.
        laid: what the others hold.
    """
    inputs = {channels.axes[i].tensor: i for i in grown if channels.axes[i].groups > 1}
    outputs = {channels.axes[i].tensor: i for i in grown if channels.axes[i].groups == 1}
    if not inputs:
        return
    first = laid.bundles.first
    origin = np.where(laid.copy >= 0, laid.copy, continued)
    value = np.where(laid.draw >= 0, laid.draw, laid.drawn + origin)
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
    draws, counts = np.unique(np.unique([laid.draw, value], axis=1)[0], return_counts=True)
    laid.sign[np.isin(laid.draw, draws[counts > 1])] = 0


def _finer(value: IntArray, kind: IntArray) -> IntArray:
    """Return numbers that are equal where values are equal and of one kind."""
    found: IntArray = np.unique([value, kind], axis=1, return_inverse=True)[1].ravel()
    return found
