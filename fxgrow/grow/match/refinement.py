"""Telling the rows of a channel apart, the same way in two runs of one network.

A row is known by what is done to it, by which rows it meets and where, by what is done to those,
and so on: colour refinement (Weisfeiler and Leman 1968) of the graph of constraints. Rows that
still look alike are exchangeable, so that any one of them may be taken for the first; that tells
others apart in turn. Rows of two channels correspond if they end up the same, and channels whose
rows do not correspond are not of one kind.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from fxgrow.channels.channels import HashArray
from fxgrow.grow.match.hashes import mix
from fxgrow.labels.forest import IntArray, Union

_ROUNDS = 8  # so far does a row see; a number that both runs have in common
_MANY = 16  # this many rows alike (a flattened map, a head) are put in order at once


def told_apart(known: HashArray, constraints: Sequence[Union], channel: IntArray) -> HashArray:
    """Return hashes that are different for all rows of a channel that meet others of it.

    Args:
        known: for each row a hash of what is known of it by itself.
        constraints: where rows met, as :class:`fxgrow.labels.rows.Rows` has them.
        channel: for each row its channel.
    """
    if not constraints:
        return known
    ends = [np.concatenate([met[side] for met in constraints]) for side in (0, 1)]
    places = [zlib.crc32(place.split(" at ")[0].encode()) for _, _, place in constraints]
    sizes = [len(left) for left, _, _ in constraints]
    codes = np.repeat(np.asarray(places, dtype=np.uint64), sizes) << np.uint64(1)
    rows, found = np.unique(ends, return_inverse=True)
    left, right = found.reshape(2, -1)
    once = np.lexsort((codes, right, left))  # train mode repeats what eval mode brings together
    new = np.ones(len(once), dtype=bool)
    new[1:] = sum(np.diff(x[once]) != 0 for x in (left, right, codes)) > 0
    left, right, codes = (x[once[new]] for x in (left, right, codes))
    colour, of = known[rows], channel[rows]
    active = np.ones(len(rows), dtype=bool)
    while True:
        seen = active[left]  # both ends are of one channel
        a, b, code = left[seen], right[seen], codes[seen]
        for _ in range(_ROUNDS):
            heard = colour.copy()
            np.add.at(heard, a, mix(colour[b] + code))
            np.add.at(heard, b, mix(colour[a] + code + np.uint64(1)))
            colour = np.where(active, mix(heard), colour)
        order = np.lexsort((rows, colour, of))
        begins = np.ones(len(rows), dtype=bool)
        begins[1:] = (np.diff(of[order]) != 0) | (np.diff(colour[order]) != 0)
        start = np.flatnonzero(begins)
        alike = np.diff(start, append=len(rows))
        several = np.flatnonzero(alike > 1)
        if not len(several):
            break
        # The first such class of each channel: the first row of it, or all if they are many.
        chosen = several[np.unique(of[order[start[several]]], return_index=True)[1]]
        for begin, count in zip(start[chosen].tolist(), alike[chosen].tolist(), strict=True):
            some = order[begin : begin + (count if count > _MANY else 1)]
            colour[some] = mix(colour[some] + np.arange(1, len(some) + 1, dtype=np.uint64))
        active = np.isin(of, of[order[start[chosen]]])
    result: HashArray = known.copy()
    result[rows] = colour
    return result
