"""Channels that only go together: the groups of group norms that get new ones.

What a norm computes of a group depends on all of its channels. So an old group must continue as one
whole new group, and twins are equal only if their groups are. A *bundle* is a channel with all that
such norms tie it to: the channels of one group, or of several that have channels in common where
norms of several sizes follow. Bundles are matched and laid out as a channel without a norm is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fxgrow.channels.channels import Channels, HashArray
from fxgrow.grow.match.hashes import mix
from fxgrow.labels.forest import IntArray, components


@dataclass(frozen=True)
class Bundles:
    """The bundles of a run, each known by its first channel.

    Attributes:
        first: the first channel of each channel's bundle.
        size: number of channels in each channel's bundle.
        signature: for each channel a hash of what its bundle is: bundles of equal ones have the
            same channels in the same groups, in order.
        cell: for each channel a hash of its own signature and of the groups that it is in.
    """

    first: IntArray
    size: IntArray
    signature: HashArray
    cell: HashArray

    def members(self, firsts: IntArray) -> IntArray:
        """Return the channels of bundles of one size, in order; shape (bundles, size)."""
        if not len(firsts) or self.size[firsts[0]] == 1:
            return firsts[:, None]
        order = np.argsort(self.first, kind="stable")
        begins = np.searchsorted(self.first[order], firsts)
        return order[begins[:, None] + np.arange(self.size[firsts[0]])]


def bundles(channels: Channels, norms: Mapping[str, int], signature: HashArray) -> Bundles:
    """Return the bundles of a run.

    Args:
        channels: of the run.
        norms: a code for each group norm that gets new groups, by its weight, the same in both
            runs.
        signature: of each channel, in which these norms have no part.
    """
    groups = {code: channels.of_norm(weight) for weight, code in norms.items()}
    unions = [(np.repeat(g[:, 0], g.shape[1]), g.ravel(), "") for g in groups.values()]
    first = components(channels.count, unions)
    if not groups:
        return Bundles(first, np.ones_like(first), signature, signature)
    inside, cell = np.zeros_like(signature), signature.copy()
    for code, members in groups.items():
        count, width = members.shape
        place = np.repeat(_rank(first[members[:, 0]]), width)
        np.add.at(inside, members.ravel(), _of_group(code, place))
        np.add.at(cell, members.ravel(), _of_group(code, np.repeat(np.arange(count), width)))
    total = np.zeros_like(signature)
    np.add.at(total, first, mix(signature + inside + mix(_rank(first).astype(np.uint64))))
    return Bundles(first, np.bincount(first, minlength=len(first))[first], total[first], cell)


def _of_group(code: int, place: IntArray) -> HashArray:
    """Return a hash of a place among the groups of a norm."""
    return mix(np.uint64(code + 1) * np.uint64(0x1_0000_0001) + place.astype(np.uint64))


def _rank(keys: IntArray) -> IntArray:
    """Return for each entry how many equal ones come before it.

    Example:
        >>> _rank(np.array([5, 7, 5, 5, 7])).tolist()
        [0, 0, 1, 2, 1]
    """
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    found = np.empty(len(keys), dtype=np.int64)
    found[order] = np.arange(len(keys)) - np.searchsorted(ordered, ordered)
    return found
