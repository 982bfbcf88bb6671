"""What normalisations over channels ask of a plan: whole copies, or padding that they ignore.

LayerNorm, RMSNorm and GroupNorm compute statistics of a set of channels. If every channel of the
set is copied the same number of times, mean and variance stay what they were, in train mode as in
eval mode and whatever lies between writer and norm, and nothing else has to change. For other
widths see :mod:`fxgrow.grow.norms.padding`, and for new groups of a GroupNorm
:mod:`fxgrow.grow.match.group_norms`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from fxgrow.channels.analysis import Analysis
from fxgrow.channels.groups import ChannelGroup, group_of_channel
from fxgrow.grow.norms.padding import Padding
from fxgrow.labels.forest import IntArray


@dataclass
class Mixed:
    """How groups grow that norms over channels depend on.

    Attributes:
        copied: the channels that are copied alone, sorted.
        padding: by group name, for those with other channels besides.
        problems: by group name, why a wanted width is impossible.
    """

    copied: IntArray
    padding: dict[str, Padding] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def lays_out(self, group: ChannelGroup) -> bool:
        """Return whether a norm says how the new channels of a group are laid out."""
        first = group.channels[0]
        place = int(np.searchsorted(self.copied, first))
        alone = place < len(self.copied) and bool(self.copied[place] == first)
        return alone or group.name in self.padding

    def grow(
        self,
        group: ChannelGroup,
        width: int,
        place: str,
        padding_for: Callable[[ChannelGroup, int], Padding | str] | None,
    ) -> None:
        """Let a group grow that a norm at some place depends on; not if others grow otherwise."""
        if padding_for is None:
            self.problems[group.name] = (
                f"{place} depends on all its channels together, and some of them do not grow alike"
            )
        elif width % group.width and group.name not in self.padding:
            padding = padding_for(group, width)
            if isinstance(padding, Padding):
                self.padding[group.name] = padding
            else:
                self.problems[group.name] = (
                    f"{place} depends on all {group.width} channels together, and {padding}, so "
                    f"they grow by whole copies; possible: {2 * group.width}"
                )

    def copies(self, groups: Sequence[ChannelGroup]) -> dict[int, int]:
        """Return, for each channel of a group with padding channels, how many there are to be."""
        return {
            channel: self.padding[group.name].copies
            for group in groups
            if group.name in self.padding
            for channel in group.channels.tolist()
        }


def mixed_groups(
    analysis: Analysis,
    widths: Mapping[str, int],
    padding_for: Callable[[ChannelGroup, int], Padding | str],
    extended: Collection[str],
) -> Mixed:
    """Return how the growing groups on which some mixer depends can grow.

    Args:
        analysis: of the network.
        widths: wanted width by group name.
        padding_for: returns how a group grows to a width that is no multiple of its present one,
            or why it cannot.
        extended: the weights of group norms that get new groups, which ask for nothing.
    """
    groups = analysis.groups
    ratios = [group.ratio(widths) for group in groups]
    group_of = group_of_channel(analysis.channels, groups)
    copied: dict[str, IntArray] = {}
    found = Mixed(np.zeros(0, dtype=np.int64))
    for members, place, norm in analysis.channels.mixers:
        if norm in extended:
            continue
        touched = np.unique(group_of[members]).tolist()
        growing = [i for i in touched if i >= 0 and ratios[i] != 1]
        alike = len({ratios[i] if i >= 0 else Fraction(1) for i in touched}) == 1
        for group in (groups[i] for i in growing):
            copied[group.name] = group.channels
            found.grow(group, widths[group.name], place, padding_for if alike else None)
    alone = [members for name, members in copied.items() if name not in found.padding]
    if alone:
        found.copied = np.unique(np.concatenate(alone))
    return found
