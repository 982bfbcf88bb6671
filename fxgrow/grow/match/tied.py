"""Channels that only go together: the groups of group norms that get new ones.

What a norm computes of a group depends on all of its channels. So an old group must continue as one
whole new group, and twins are equal only if their groups are. *Tied*
channels are those of one group, or of several that have channels in common where norms of several
sizes follow; they are matched and laid out together, as a channel without a norm is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fxgrow.channels.channels import Channels, HashArray
from fxgrow.grow.match.hashes import mix
from fxgrow.labels.forest import IntArray, components


@dataclass(frozen=True)
class Tied:
    """The tied channels of a run, known by the first of them.

    Attributes:
        first: for each channel, the first of those that it is tied to.
        size: for each channel, how many these are.
        signature: for each channel a hash of what these are: for equal ones, the same channels are
            in the same groups, in order.
        cell: for each channel a hash of its own signature and of the groups that it is in.
    """

    first: IntArray
    size: IntArray
    signature: HashArray
    cell: HashArray

    def members(self, firsts: IntArray) -> IntArray:
        """Return the tied channels of one size, in order; shape (number, size)."""
        if not len(firsts) or self.size[firsts[0]] == 1:
            return firsts[:, None]
        order = np.argsort(self.first, kind="stable")
        begins = np.searchsorted(self.first[order], firsts)
        return order[begins[:, None] + np.arange(self.size[firsts[0]])]


def tied_channels(channels: Channels, norms: Mapping[str, int], signature: HashArray) -> Tied:
    """Return the tied channels of a run.

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
        return Tied(first, np.ones_like(first), signature, signature)
    inside, cell = np.zeros_like(signature), signature.copy()
    for code, members in groups.items():
        count, width = members.shape
        place = np.repeat(_rank(first[members[:, 0]]), width)
        np.add.at(inside, members.ravel(), _of_group(code, place))
        np.add.at(cell, members.ravel(), _of_group(code, np.repeat(np.arange(count), width)))
    total = np.zeros_like(signature)
    np.add.at(total, first, mix(signature + inside + mix(_rank(first).astype(np.uint64))))
    return Tied(first, np.bincount(first, minlength=len(first))[first], total[first], cell)


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
