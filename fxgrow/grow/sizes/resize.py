"""From new group widths to the new sizes of every tensor, by counting.

How many positions an axis has afterwards, :mod:`fxgrow.grow.sizes.growth` counts. Where the parts
of several groups are not whole, and their sum is, which group has one row more and which one less,
the run at the new sizes shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd, lcm

import numpy as np

from fxgrow.channels.channels import Channels
from fxgrow.channels.groups import ChannelGroup, group_of_channel
from fxgrow.grow.match.group_norms import new_norm_groups
from fxgrow.grow.sizes.growth import growth_of
from fxgrow.grow.sizes.widths import nearest_widths
from fxgrow.modules.tensors import layer_of
from fxgrow.plan.requests import Grouped
from fxgrow.plan.step import Refusal


@dataclass(frozen=True)
class Sizes:
    """The new sizes of a network.

    Attributes:
        shapes: new shape of every tensor that changes.
        convolution_groups: new ``groups`` of every grouped convolution whose number of groups
            changes, by its weight.
        widths: new width of each group that grows, by name.
        refused: groups that cannot have the width that was asked for.
        norm_groups: new number of groups of every group norm that gets new ones, by its weight.
    """

    shapes: dict[str, tuple[int, ...]]
    convolution_groups: dict[str, int]
    widths: dict[str, int]
    refused: tuple[Refusal, ...]
    norm_groups: dict[str, int] = field(default_factory=dict)


def new_sizes(
    channels: Channels,
    groups: Sequence[ChannelGroup],
    widths: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    grouped: Grouped,
    *,
    copying: Collection[str] = (),
    rounded: Collection[str] = (),
) -> Sizes:
    """Return the sizes that follow from new widths; what is impossible is refused and left out.

    Args:
        channels: the channels at the old sizes.
        groups: all channel groups.
        widths: wanted width by group name.
        shapes: present shape by tensor name.
        grouped: whether a grouped convolution grows inside each group or by whole groups.
        copying: the groups whose group norms keep their numbers of groups if whole copies fit.
        rounded: the groups whose widths are ratios, which are rounded up where rows make up the
            channels of a layer together: the gates of a recurrent one.
    """
    wanted = dict(widths)
    refused: dict[str, str] = {}
    while True:
        counted = _Count(channels, groups, wanted, shapes, grouped)
        counted.run()
        norms, misfits = new_norm_groups(
            channels, groups, wanted, counted.shapes, grouped, copying=copying
        )
        problems = misfits | counted.problems
        if not problems:
            found = tuple(Refusal(name, reason) for name, reason in refused.items())
            return Sizes(counted.shapes, counted.convolution_groups, wanted, found, norms)
        up = {name: width for name, width in counted.next.items() if name in rounded}
        wanted |= up  # a multiple of the present width always divides, so that this ends
        for name, reason in problems.items() if not up else ():
            refused[name] = reason
            del wanted[name]


def _rows_of(group: ChannelGroup) -> Counter[int]:
    """Return how many channels of a group have so many rows each."""
    return Counter(np.unique(group.rows, return_counts=True)[1].tolist())


def _whole(group: ChannelGroup) -> int:
    """Return of what a width has to be a multiple, so that all channels of a group are whole."""
    return lcm(*(group.followed // gcd(group.followed, n) for n in _rows_of(group).values()))


@dataclass
class _Count:
    """The sizes that follow from some widths, and why some of these are impossible.

    Attributes:
        channels, groups, widths, old, grouped: the arguments of :func:`new_sizes`.
        shapes: new shape of every tensor that changes.
        convolution_groups: new ``groups`` of every grouped convolution that is touched.
        problems: by group name, why its width is impossible.
        next: by group name, the next width that divides among its positions.
    """

    channels: Channels
    groups: Sequence[ChannelGroup]
    widths: Mapping[str, int]
    old: Mapping[str, tuple[int, ...]]
    grouped: Grouped
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    convolution_groups: dict[str, int] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    next: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._group_of = group_of_channel(self.channels, self.groups)
        self._growth = growth_of(self.channels, self.groups, self.widths)
        self._axes: dict[str, list[int]] = {}
        for index, axis in enumerate(self.channels.axes):
            self._axes.setdefault(axis.tensor, []).append(index)

    def run(self) -> None:
        """Count."""
        self._count_channels()
        sides = self._count_positions()
        for weight, split in self.channels.convolution_groups.items():
            growing = self._growing(weight)
            if not growing:
                continue
            if split == 0:  # depthwise
                self.convolution_groups[weight] = self.shapes.get(weight, self.old[weight])[0]
                continue
            rows, columns = self.old[weight][:2]
            incoming = sides.get((weight, "in"), split * columns)
            outgoing = sides.get((weight, "out"), rows)
            grow = self._add_groups if self.grouped == "count" else self._fill_groups
            grow(weight, incoming, outgoing, growing)
        self.shapes = {name: s for name, s in self.shapes.items() if s != tuple(self.old[name])}

    def _set(self, tensor: str, dim: int, size: int) -> None:
        """Give a tensor a new size."""
        shape = self.shapes.get(tensor, tuple(self.old[tensor]))
        self.shapes[tensor] = (*shape[:dim], size, *shape[dim + 1 :])

    def _count_channels(self) -> None:
        """Note the groups whose channels have several rows, and would not be whole."""
        for group in self.groups:
            wanted = self.widths.get(group.name, group.width)
            if wanted == group.width:
                continue
            several = _rows_of(group)
            for rows, count in sorted(several.items()):
                if count * wanted % group.followed:
                    step = _whole(group)
                    each = rows if len(several) == 1 else 1
                    near = nearest_widths(step, wanted, group.width, each)
                    self.next[group.name] = -(-wanted // step) * step
                    self.problems[group.name] = (
                        f"width {wanted} is no whole number of channels, of which each has {rows} "
                        f"rows, and a width counts rows; possible: {near}"
                    )

    def _count_positions(self) -> dict[tuple[str, str], int]:
        """Set the size of every axis; return those of grouped weights by ``in`` and ``out``."""
        channels = self.channels
        sums = np.append(0, np.cumsum(self._growth.parts[channels.channel]))
        totals = np.diff(sums[channels.start]).tolist()
        sides: dict[tuple[str, str], int] = {}
        for index, (axis, total) in enumerate(zip(channels.axes, totals, strict=True)):
            size, rest = divmod(total, self._growth.whole)
            if rest:
                self._note_parts(index)
            in_groups = axis.tensor in channels.convolution_groups
            if in_groups and (axis.groups > 1 or axis.dim == 0):
                sides[axis.tensor, "in" if axis.groups > 1 else "out"] = size
            if axis.groups == 1 and size != self.old[axis.tensor][axis.dim]:
                self._set(axis.tensor, axis.dim, size)
        return sides

    def _note_parts(self, index: int) -> None:
        """Note the groups that have a broken part of an axis whose size would not be whole."""
        axis = self.channels.axes[index]
        positions = Counter(self._group_of[self.channels.of_axis(index)].tolist())
        for member, count in sorted(positions.items()):
            group = self.groups[member]
            wanted = self.widths.get(group.name, group.width)
            if member >= 0 and count * wanted % group.followed and group.name not in self.problems:
                step = lcm(_whole(group), group.followed // gcd(group.followed, count))
                self.next[group.name] = -(-wanted // step) * step
                places = f"{count} positions" if group.followed_at is None else "channels"
                self.problems[group.name] = (
                    f"width {wanted} does not divide among its {places} in {axis.tensor}; "
                    f"a multiple of {step} would: {nearest_widths(step, wanted, group.width)}"
                )

    def _growing(self, weight: str) -> list[ChannelGroup]:
        """Return the groups with a wanted width that a grouped convolution touches."""
        axes = [self._group_of[self.channels.of_axis(i)] for i in self._axes.get(weight, ())]
        touched = {member for owners in axes for member in owners.tolist()}
        found = [self.groups[member] for member in sorted(touched) if member >= 0]
        return [group for group in found if group.name in self.widths]

    def _add_groups(
        self, weight: str, incoming: int, outgoing: int, growing: Sequence[ChannelGroup]
    ) -> None:
        """Let a convolution have more groups of the size that they have."""
        split, (rows, columns) = self.channels.convolution_groups[weight], self.old[weight][:2]
        count, rest = divmod(incoming, columns)
        if rest or outgoing != count * (rows // split):
            for group in growing:
                self.problems[group.name] = (
                    f"by whole groups, the input and the output of {layer_of(weight)} must grow by "
                    f"the same number of its {split} groups; widen both, by a multiple of "
                    f"{group.width // split} channels"
                )
        self.convolution_groups[weight] = count

    def _fill_groups(
        self, weight: str, incoming: int, outgoing: int, growing: Sequence[ChannelGroup]
    ) -> None:
        """Let the groups that a convolution has be larger."""
        split = self.channels.convolution_groups[weight]
        wrong = [dim for dim, size in enumerate((outgoing, incoming)) if size % split]
        axes = [i for i in self._axes.get(weight, ()) if self.channels.axes[i].dim in wrong]
        owners = {m for i in axes for m in self._group_of[self.channels.of_axis(i)].tolist()}
        for group in growing:
            if any(self.groups[member] is group for member in owners if member >= 0):
                near = nearest_widths(split, self.widths[group.name], group.width)
                self.problems[group.name] = (
                    f"width {self.widths[group.name]} does not divide among the {split} groups of "
                    f"{layer_of(weight)}; possible: {near}"
                )
        self._set(weight, 1, incoming // split)
