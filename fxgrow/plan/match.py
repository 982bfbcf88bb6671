"""Which channel of the new network continues which channel of the old one.

A channel's signature is the multiset of (axis, convolution group) it touches. Each old channel is
matched to a new one of the same signature, in order; what remains of the new ones are the new
channels. No operation needs code of its own for this, and nothing assumes that new channels come
last: behind a split or a shuffle they do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fxgrow.channels import Channels
from fxgrow.errors import PlanError
from fxgrow.groups import layer_of
from fxgrow.labels.space import IntArray
from fxgrow.pairing import Pairing

HashArray: TypeAlias = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Matching:
    """For each channel of the new network, where it comes from.

    Attributes:
        old: the old channel it continues, or -1 if it is new.
        draw: for a new channel the drawn value it carries; twins share one. -1 for old ones.
        sign: for a new channel the sign of its columns at every reader: +1, −1 or 0.
    """

    old: IntArray
    draw: IntArray
    sign: IntArray


def _signatures(
    channels: Channels, axis_codes: Sequence[int], new_groups: dict[int, int]
) -> HashArray:
    """Return a 64-bit hash of each channel's signature.

    Args:
        channels: the channels of a run.
        axis_codes: a code for each axis, the same in both runs.
        new_groups: for an axis whose number of convolution groups grew, the old number; new
            groups that will be twins get one and the same code.
    """
    group = channels.group_of_row.copy()
    for axis, old in new_groups.items():
        rows = slice(int(channels.start[axis]), int(channels.start[axis + 1]))
        inside = group[rows]
        fresh = max((int(inside.max()) + 1 - old + 1) // 2, 1)
        group[rows] = np.where(inside < old, inside, old + (inside - old) % fresh)
    codes = np.asarray(axis_codes, dtype=np.uint64)[channels.axis_of_row]
    mixed = _mix(codes * np.uint64(0x1_0000_0001) + group.astype(np.uint64) + np.uint64(1))
    total = np.zeros(channels.count, dtype=np.uint64)
    np.add.at(total, channels.channel, mixed)
    return total


def _mix(values: HashArray) -> HashArray:
    """Return well-mixed 64-bit hashes (the splitmix64 finaliser), so that their sums differ."""
    z: HashArray = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: HashArray = z ^ (z >> np.uint64(31))
    return mixed


def match(old: Channels, new: Channels, pairing: Pairing) -> Matching:
    """Match the channels of a network at its old and its new sizes.

    Args:
        old: the run at the old sizes.
        new: the run at the new sizes.
        pairing: lays out the new channels of each signature.

    Raises:
        PlanError: some old channel has no place in the new network.
    """
    keys = {(axis.tensor, axis.dim): code for code, axis in enumerate(old.axes)}
    if {(axis.tensor, axis.dim) for axis in new.axes} != set(keys):
        raise PlanError("the network computes with other tensors at its new sizes.")
    new_codes = [keys[axis.tensor, axis.dim] for axis in new.axes]
    grown = {
        index: before
        for index, axis in enumerate(new.axes)
        if (before := old.convolution_groups.get(axis.tensor, 0)) > 0
        and before < new.convolution_groups.get(axis.tensor, 0)
    }
    old_signature = _signatures(old, range(len(old.axes)), {})
    new_signature = _signatures(new, new_codes, grown)

    # Channels of one signature side by side, each in order of first use.
    old_buckets, new_buckets = _buckets(old_signature), _buckets(new_signature)
    for kind, members in old_buckets.items():
        missing = len(members) - len(new_buckets.get(kind, ()))
        if missing > 0:
            row = int(np.flatnonzero(old.channel == members[0])[0])
            layer = layer_of(old.axes[int(old.axis_of_row[row])].tensor)
            raise PlanError(
                f"{missing} channels of {layer} would have no place in the widened network.",
                name=layer,
            )
    continued = np.full(new.count, -1, dtype=np.int64)
    draw = np.full(new.count, -1, dtype=np.int64)
    sign = np.zeros(new.count, dtype=np.int64)
    drawn = 0
    for kind, members in new_buckets.items():
        olds = old_buckets.get(kind, members[:0])
        continued[members[: len(olds)]] = olds
        fresh = members[len(olds) :]
        if len(fresh):
            layout = pairing(len(fresh))
            draw[fresh] = np.asarray(layout.draws) + drawn
            sign[fresh] = layout.column_signs
            drawn += max(layout.draws) + 1
    return Matching(continued, draw, sign)


def _buckets(signature: HashArray) -> dict[int, IntArray]:
    """Return the channels of each signature, ascending."""
    order = np.argsort(signature, kind="stable")
    kinds, first = np.unique(signature[order], return_index=True)
    return dict(zip(kinds.tolist(), np.split(order, first[1:]), strict=True))
