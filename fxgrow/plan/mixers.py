"""What normalisations over channels ask of a plan: whole copies.

LayerNorm, RMSNorm and GroupNorm compute statistics of a set of channels. If every channel of the
set is copied the same number of times, mean and variance stay what they were, in train mode as in
eval mode and whatever lies between writer and norm, and nothing else has to change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fxgrow.channels import Channels
from fxgrow.groups import ChannelGroup, group_of_channel
from fxgrow.labels.space import IntArray


def mixed_groups(
    channels: Channels, groups: Sequence[ChannelGroup], widths: Mapping[str, int]
) -> tuple[IntArray, dict[str, str]]:
    """Return the channels that can only be copied, and why each impossible group is impossible.

    Args:
        channels: the channels at the old sizes.
        groups: all channel groups.
        widths: wanted width by group name.

    Returns:
        The channels of growing groups that some mixer depends on, sorted; and for each group
        whose wanted width no number of whole copies gives, the reason.
    """
    group_of = group_of_channel(channels, groups)
    copied: list[IntArray] = []
    problems: dict[str, str] = {}
    for members, place in channels.mixers:
        touched = np.unique(group_of[members]).tolist()
        growing = [groups[i] for i in touched if i >= 0 and groups[i].name in widths]
        ratios = {
            (widths[groups[i].name], groups[i].width) if i >= 0 and groups[i].name in widths
            else (1, 1)
            for i in touched
        }  # fmt: skip
        factors = {new / old for new, old in ratios}
        for group in growing:
            if widths[group.name] == group.width:
                continue
            copied.append(group.channels)
            if len(factors) > 1:
                problems[group.name] = (
                    f"{place} depends on all its channels together, and some of them do not grow "
                    "alike"
                )
            elif widths[group.name] % group.width:
                problems[group.name] = (
                    f"{place} depends on all {group.width} channels together, so they grow by "
                    f"whole copies; possible: {2 * group.width}"
                )
    whole = np.unique(np.concatenate(copied)) if copied else np.zeros(0, dtype=np.int64)
    return whole, problems
