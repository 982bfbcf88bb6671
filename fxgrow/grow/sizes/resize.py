"""From new group widths to the new sizes of every tensor, by counting.

An axis that holds n rows of a group of width h holds n·h'/h of them afterwards: a concatenation
adds its groups up, a flatten multiplies by its spatial positions, and both come out of the count.
So does a shuffle, where only the sum over all groups must be whole: which group has one row more
and which one less, the run at the new sizes shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import gcd

import numpy as np

from fxgrow.channels.channels import Channels
from fxgrow.channels.groups import ChannelGroup, group_of_channel
from fxgrow.grow.match.group_norms import new_norm_groups
from fxgrow.grow.sizes.widths import nearest_widths
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
    copying: bool = False,
) -> Sizes:
    """Return the sizes that follow from new widths; what is impossible is refused and left out.

    Args:
        channels: the channels at the old sizes.
        groups: all channel groups.
        widths: wanted width by group name.
        shapes: present shape by tensor name.
        grouped: whether a grouped convolution grows inside each group or by whole groups.
        copying: whether group norms keep their numbers of groups where whole copies fit.
    """
    wanted = dict(widths)
    refused: dict[str, str] = {}
    while True:
        sizes, problems = _attempt(channels, groups, wanted, shapes, grouped)
        norms, misfits = new_norm_groups(
            channels, groups, wanted, sizes[0], grouped, copying=copying
        )
        problems = misfits | problems
        if not problems:
            found = tuple(Refusal(name, reason) for name, reason in refused.items())
            return Sizes(sizes[0], sizes[1], wanted, found, norms)
        for name, reason in problems.items():
            refused[name] = reason
            del wanted[name]


def _rows_per_channel(group: ChannelGroup) -> dict[int, int]:
    """Return, for each number of rows that channels have in the first writer, how many have it."""
    rows = np.unique(group.rows, return_counts=True)[1]
    return dict(zip(*(part.tolist() for part in np.unique(rows, return_counts=True)), strict=True))


def _attempt(
    channels: Channels,
    groups: Sequence[ChannelGroup],
    widths: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    grouped: Grouped,
) -> tuple[tuple[dict[str, tuple[int, ...]], dict[str, int]], dict[str, str]]:
    """Return new shapes and convolution groups, and why each impossible group is impossible."""
    group_of = group_of_channel(channels, groups)
    new_shapes: dict[str, list[int]] = {}
    new_groups: dict[str, int] = {}
    problems: dict[str, str] = {}
    positions: dict[tuple[str, str], int] = {}  # (weight, "in" | "out") -> new positions
    touching: dict[str, set[int]] = {}
    for group in groups:
        wanted = widths.get(group.name, group.width)
        for rows, count in _rows_per_channel(group).items():
            if count * wanted % group.width:
                step = group.width // gcd(group.width, count)
                near = nearest_widths(step, wanted, group.width)
                problems[group.name] = (
                    f"width {wanted} is not a whole number of its channels, which have {rows} rows "
                    f"each; possible: {near}"
                )
    for index, axis in enumerate(channels.axes):
        held, counts = np.unique(group_of[channels.of_axis(index)], return_counts=True)
        more: dict[int, Fraction] = {}  # new positions by group, as it were
        for member, count in zip(held.tolist(), counts.tolist(), strict=True):
            if member >= 0 and (asked := widths.get(groups[member].name)) is not None:
                more[member] = Fraction(count * asked, groups[member].width) - count
        # Behind a shuffle the parts of several groups need not be whole, but their sum must be.
        total = sum(more.values(), Fraction(axis.size))
        size = int(total)
        if total.denominator > 1:
            for member, part in more.items():
                if part.denominator > 1:
                    group, count = groups[member], int(counts[held == member][0])
                    problems[group.name] = (
                        f"width {widths[group.name]} does not divide among its {count} positions "
                        f"in {axis.tensor}; a multiple of "
                        f"{group.width // gcd(group.width, count)} would"
                    )
        split = channels.convolution_groups.get(axis.tensor)
        if split is not None:
            side = "in" if axis.groups > 1 else "out"
            positions[axis.tensor, side] = size
            touching.setdefault(axis.tensor, set()).update(m for m in held.tolist() if m >= 0)
        if axis.groups == 1 and size != axis.size:
            new_shapes.setdefault(axis.tensor, list(shapes[axis.tensor]))[axis.dim] = size
    for weight, members in touching.items():
        growing = [groups[m] for m in sorted(members) if groups[m].name in widths]
        if not growing:
            continue
        shape = new_shapes.setdefault(weight, list(shapes[weight]))
        split = channels.convolution_groups[weight]
        if split == 0:  # depthwise
            new_groups[weight] = shape[0]
            continue
        incoming = positions.get((weight, "in"), split * shapes[weight][1])
        outgoing = positions.get((weight, "out"), shapes[weight][0])
        layer = weight.rpartition(".")[0]
        if grouped == "count":
            count, rest = divmod(incoming, shapes[weight][1])
            if rest or outgoing != count * (shapes[weight][0] // split):
                for group in growing:
                    problems[group.name] = (
                        f"by whole groups, the input and the output of {layer} must grow by the "
                        f"same number of its {split} groups; widen both, by a multiple of "
                        f"{group.width // split} channels"
                    )
            new_groups[weight] = count
        else:
            for group in growing:
                if incoming % split or outgoing % split:
                    near = nearest_widths(split, widths[group.name], group.width)
                    problems[group.name] = (
                        f"width {widths[group.name]} does not divide among the {split} groups of "
                        f"{layer}; possible: {near}"
                    )
            shape[1] = incoming // split
    result = {name: tuple(shape) for name, shape in new_shapes.items()}
    changed = {name: shape for name, shape in result.items() if shape != tuple(shapes[name])}
    return (changed, new_groups), problems
