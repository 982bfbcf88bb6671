"""Group norms: which of them get new groups, and which grow inside the groups that they have.

What a group norm computes of a group does not change as long as its channels are the same ones, or
each of them is copied the same number of times. So there are two ways to widen it: by whole new
groups of the size that its groups have, which says nothing about what new channels hold, or by
whole copies inside each group, which keeps their number.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from fxgrow.channels.channels import Channels
from fxgrow.channels.groups import ChannelGroup, group_of_channel
from fxgrow.errors import listed
from fxgrow.grow.obstacle import Obstacle
from fxgrow.modules.tensors import layer_of
from fxgrow.plan.requests import Grouped


def new_norm_groups(
    channels: Channels,
    groups: Sequence[ChannelGroup],
    widths: Mapping[str, int],
    new_shapes: Mapping[str, tuple[int, ...]],
    grouped: Grouped,
    *,
    copying: Collection[str],
) -> tuple[dict[str, int], dict[str, str]]:
    """Return the new number of groups of each group norm that gets new ones.

    A norm of one group stays one, as a layer norm does, and grows by whole copies; with ``count``
    it gets new groups as any other. A norm whose groups are one channel each always does.

    Args:
        channels: the channels at the old sizes.
        groups: all channel groups.
        widths: wanted width by group name.
        new_shapes: new shape of each tensor that changes.
        grouped: ``count`` asks for new groups everywhere.
        copying: names of channel groups that keep the number of groups where whole copies fit.

    Returns:
        The numbers by weight, and by the name of a channel group why its width is impossible.
    """
    counts: dict[str, int] = {}
    problems: dict[str, str] = {}
    group_of = group_of_channel(channels, groups)
    for weight, count in channels.norm_groups.items():
        if weight not in new_shapes:
            continue
        members = channels.of_norm(weight)
        size, width = members.shape[1], new_shapes[weight][0]
        mixing = bool((members != members[:, :1]).any())
        touched = [groups[i] for i in np.unique(group_of[members]).tolist() if i >= 0]
        if mixing and grouped == "width":
            ratios = {group.ratio(widths) for group in touched}
            whole = len(ratios) == 1 and next(iter(ratios)).denominator == 1
            if count == 1 or (whole and all(group.name in copying for group in touched)):
                continue
        counts[weight], rest = divmod(width, size)
        for group in touched if rest else ():
            if widths.get(group.name, group.width) != group.width:
                problems[group.name] = (
                    f"{layer_of(weight)} normalises {count} groups of {size} channels, and {width} "
                    f"are no whole number of such groups; possible: "
                    f"{_possible(channels, group, widths[group.name])}"
                )
    return counts, problems


def _possible(channels: Channels, group: ChannelGroup, wanted: int) -> str:
    """Return the widths of a group around a wanted one that are whole groups of all its norms."""
    step = 1
    for weight in channels.norm_groups:
        members = channels.of_norm(weight)
        held = Fraction(int(np.isin(members, group.channels).sum()), group.width)
        if held:
            size = members.shape[1]
            step = lcm(step, held.denominator * (size // gcd(held.numerator, size)))
    more = wanted - group.width
    widths = {group.width + more // step * step, group.width - -more // step * step}
    return " or ".join(str(width) for width in sorted(widths) if width > group.width)


def with_new_groups(old: Channels, new: Channels) -> dict[str, int] | Obstacle:
    """Return the group norms that have more groups at the new sizes, all of the same size.

    Where the groups of some norm are of another number and of another size, that is in the way.
    """
    found: dict[str, int] = {}
    for weight, before in old.norm_groups.items():
        after = new.norm_groups.get(weight, before)
        if after == before:
            continue
        sizes = [run.of_norm(weight).shape[1] for run in (old, new)]
        if sizes[0] != sizes[1]:
            return Obstacle(
                f"{layer_of(weight)} normalises {before} groups of {sizes[0]} channels in the "
                f"source and {after} of {sizes[1]} there",
                name=layer_of(weight),
            )
        found[weight] = after
    return found


def warnings_of(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """Return what to warn of where group norms get new groups.

    Args:
        before: number of groups by weight.
        after: the new number of those that get new ones.
    """
    told = [f"{layer_of(weight)}: {before[weight]} → {count}" for weight, count in after.items()]
    if not told:
        return []
    return [
        f"group norms get new groups ({listed(told)}); a state_dict does not hold how many there "
        "are; fxgrow.load sets it, and so does fxgrow.training.regrow_ after growth in place"
    ]
