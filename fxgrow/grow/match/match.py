"""Which channel of the new network continues which channel of the old one.

A channel's signature is the multiset of (axis, convolution group) it touches. Each old channel is
matched to a new one of the same signature, in order; what remains of the new ones are the new
channels. No operation needs code of its own for this, and nothing assumes that new channels come
last: behind a split or a shuffle they do not. Where a signature has too few new channels, one that
is read by more layers serves too. The channels of a group of a group norm that gets new ones are
matched as one.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from fxgrow.channels.channels import Channels, HashArray
from fxgrow.errors import listed
from fxgrow.grow.match.assignment import Assignment, check_copies, check_order, part_twins
from fxgrow.grow.match.group_norms import with_new_groups
from fxgrow.grow.match.hashes import mix
from fxgrow.grow.match.reassignment import BySignature, told_groups
from fxgrow.grow.match.refinement import told_apart
from fxgrow.grow.match.tied import Tied, tied_channels
from fxgrow.grow.obstacle import Obstacle
from fxgrow.labels.forest import IntArray
from fxgrow.modules.tensors import layer_of
from fxgrow.plan.pairing import Pairing, drawing, replicate


@dataclass(frozen=True)
class Matching:
    """For each channel of the new network, where it comes from.

    Attributes:
        old: the old channel it continues, or -1 if it is new.
        draw: for a new channel the drawn value it carries; twins share one. -1 for old ones.
        sign: for a new channel the sign of its columns at every reader: +1, −1 or 0.
        copy: for a new channel the old one whose value it copies, or -1.
        row: for a new channel the old one whose value it copies while its columns are drawn, or
            -1.
        padding: for a new channel whether it must leave the norms over its group as they are, see
            :mod:`fxgrow.grow.norms.padding`, or be zero, see
            :mod:`fxgrow.grow.norms.zero_channels`.
        old_rank, new_rank: for each row of either network, its place among those of its axis and
            channel: a row of the new network continues that of the same place.
    """

    old: IntArray
    draw: IntArray
    sign: IntArray
    copy: IntArray
    row: IntArray
    padding: npt.NDArray[np.bool_]
    old_rank: IntArray
    new_rank: IntArray

    @cached_property
    def is_copied(self) -> npt.NDArray[np.bool_]:
        """Whether each old channel has copies."""
        found = np.zeros(
            max(int(self.old.max(initial=-1)), int(self.copy.max(initial=-1))) + 1, dtype=bool
        )
        found[self.copy[self.copy >= 0]] = True
        return found


def _signatures(
    channels: Channels,
    axis_codes: Sequence[int],
    new_groups: dict[int, int],
    history: Sequence[str],
    row_hashes: HashArray,
) -> HashArray:
    """Return a 64-bit hash of each channel's signature.

    Args:
        channels: the channels of a run.
        axis_codes: a code for each axis, the same in both runs.
        new_groups: for an axis whose number of convolution groups grew, the old number; new
            groups that will be twins get one and the same code.
        history: what was done to channels, in order.
        row_hashes: for each label, a hash of what was done to it.
    """
    group = channels.group_of_row.copy()
    for axis, old in new_groups.items():
        rows = slice(int(channels.start[axis]), int(channels.start[axis + 1]))
        inside = group[rows]
        fresh = max((int(inside.max()) + 1 - old + 1) // 2, 1)
        group[rows] = np.where(inside < old, inside, old + (inside - old) % fresh)
    codes = np.asarray(axis_codes, dtype=np.uint64)[channels.axis_of_row]
    mixed = mix(codes * np.uint64(0x1_0000_0001) + group.astype(np.uint64) + np.uint64(1))
    total = np.zeros(channels.count, dtype=np.uint64)
    np.add.at(total, channels.channel, mix(mixed + row_hashes[channels.label_of_row]))
    for done, (_, labels) in zip(history, channels.history, strict=False):
        members = channels.channel_of_label[labels]
        total[members[members >= 0]] += _code_of(done)  # once for each channel
    return total


def _row_hashes(channels: Channels, axis_codes: Sequence[int], history: Sequence[str]) -> HashArray:
    """Return, for each label, a hash of its row's axes and what was done to it; one per label."""
    row = channels.rows.of_label
    total = np.zeros(len(row), dtype=np.uint64)
    codes = np.asarray(axis_codes, dtype=np.uint64)[channels.axis_of_row] + np.uint64(1)
    np.add.at(total, row[channels.label_of_row], mix(codes))
    for done, (_, labels) in zip(history, channels.history, strict=False):
        total[row[labels]] += _code_of(done)  # once for each row
    # Other operations bring others together.
    constraints = channels.rows.constraints if history else ()
    return told_apart(total, constraints, channels.channel_of_label)[row]


def _code_of(done: str) -> int:
    return zlib.crc32(done.encode()) << 20


def _common_history(old: Channels, new: Channels) -> list[str] | Obstacle:
    """Return what the operations of two runs did, none of it if they did not run the same ones.

    Other tensors, and an operation that computes with another number, are in the way.
    """
    places = [{(axis.tensor, axis.dim) for axis in run.axes} for run in (old, new)]
    if places[0] != places[1]:
        added, lost = (sorted({name for name, _ in x - y}) for x, y in (places[::-1], places))
        told = [f"with {listed(added)}" if added else "", f"without {listed(lost)}" if lost else ""]
        return Obstacle(
            f"at its new sizes the network computes {' and '.join(filter(None, told))}, other than "
            "now: its code decides by a size, or by values, which tensors take part"
        )
    before, after = ([done for done, _ in channels.history] for channels in (old, new))
    names = [[done.split()[0] for done in history] for history in (before, after)]
    if names[0] != names[1]:  # the same written in other operations, which says nothing
        return []
    for was, becomes in zip(before, after, strict=True):
        if was != becomes:
            name, *numbers = was.split()
            return Obstacle(
                f"{name} computes with {' and '.join(numbers)} at the present widths and with "
                f"{' and '.join(becomes.split()[1:])} at the new ones: the code makes a number of "
                "a width"
            )
    return _numbered(old)


def _numbered(channels: Channels) -> list[str]:
    """Return what the operations of a run did, each by its place in the order."""
    return [f"{place} {done}" for place, (done, _) in enumerate(channels.history)]


def match(
    old: Channels,
    new: Channels,
    pairing: Pairing,
    copied: IntArray,
    copies: Mapping[int, int] = MappingProxyType({}),
    pairings: Mapping[int, Pairing] = MappingProxyType({}),
    of_empty: Mapping[tuple[str, int], Pairing] = MappingProxyType({}),
) -> Matching | Obstacle:
    """Match the channels of a network at its old and its new sizes.

    Args:
        old: the run at the old sizes.
        new: the run at the new sizes.
        pairing: lays out the new channels of each signature.
        copied: old channels that can only be copied, whatever the pairing; sorted.
        copies: for old channels whose group has padding channels, how many of each there are to be.
        pairings: for old channels whose group has a pairing of its own, that one.
        of_empty: likewise, by tensor and dim, for groups without old channels.

    Returns:
        The matching, or why some old channel has no place in the new network.
    """
    norms, runs = with_new_groups(old, new), (old, new)
    if isinstance(norms, Obstacle):
        return norms
    old, new = _without(old, norms), _without(new, norms)
    history = _common_history(old, new)
    if isinstance(history, Obstacle):
        return history
    keys = {(axis.tensor, axis.dim): code for code, axis in enumerate(old.axes)}
    codes = range(len(old.axes)), [keys[axis.tensor, axis.dim] for axis in new.axes]
    grown = _grown(old, new)
    hashes = [_row_hashes(run, of, history) for run, of in zip((old, new), codes, strict=True)]
    signatures = (
        _signatures(old, codes[0], {}, history, hashes[0]),
        _signatures(new, codes[1], grown, history, hashes[1]),
    )
    # Tied channels of one signature side by side, each in order of first use.
    norm_codes = {weight: code for code, weight in enumerate(norms)}
    mine, theirs = map(tied_channels, runs, (norm_codes, norm_codes), signatures)
    buckets = _buckets(mine), _buckets(theirs)
    continued, oversubscribed = _in_order(new.count, *buckets)
    if torn := [first for first in oversubscribed if mine.size[first] > 1]:
        return _torn(runs, norms, torn[0])
    alone = _alone(mine, buckets[0]), _alone(theirs, buckets[1])
    signed = BySignature(old, new, codes[1], *alone, history)
    if obstacle := signed.reassign(continued, oversubscribed):
        return obstacle
    found, only_copied = Assignment.empty(theirs), frozenset(copied.tolist())
    for members in buckets[1].values():
        fresh, taken = members[continued[members] < 0], members[continued[members] >= 0]
        kept = np.sort(continued[taken])
        continued[theirs.members(taken)] = mine.members(continued[taken])
        first = next(iter(kept.tolist()), -1)
        own = pairing
        if len(fresh) and (pairings or of_empty):
            beside = first if first >= 0 else _beside(old, new, fresh)
            own = pairings.get(beside, pairing)
            own = own if beside >= 0 else next(_of_axes(new, fresh, of_empty), pairing)
        chosen = drawing(own) if first in copies else own
        chosen = replicate if first in only_copied else chosen
        if len(fresh):
            left = found.copy_whole(fresh, kept, copies.get(first, 0))
            found.lay_out(left, mine.members(kept), chosen, _name(old, kept))
    alone_copied = copied[~np.isin(copied, list(copies))]
    if obstacle := check_order(old, new, list(grown), continued):
        return obstacle
    if obstacle := check_copies(old, new, alone_copied, continued, found.copy):
        return obstacle
    part_twins(new, list(grown), continued, found)
    ranks = old.ranks(hashes[0]), new.ranks(hashes[1])
    return Matching(continued, found.draw, found.sign, found.copy, found.row, found.padding, *ranks)


def _beside(old: Channels, new: Channels, fresh: IntArray) -> int:
    """Return an old channel that an axis holds on which the first of new ones lies; -1 for none."""
    axes = {(axis.tensor, axis.dim): index for index, axis in enumerate(old.axes)}
    for row in np.flatnonzero(new.channel == fresh[0]).tolist():
        axis = new.axes[int(new.axis_of_row[row])]
        held = old.of_axis(axes[axis.tensor, axis.dim])
        if len(held):
            return int(held[0])
    return -1


def _of_axes(
    new: Channels, fresh: IntArray, settings: Mapping[tuple[str, int], Pairing]
) -> Iterator[Pairing]:
    """Yield the settings, by tensor and dim, of the axes with the first of new channels."""
    for index in new.axis_of_row[new.channel == fresh[0]].tolist():
        axis = new.axes[index]
        if (axis.tensor, axis.dim) in settings:
            yield settings[axis.tensor, axis.dim]


def _grown(old: Channels, new: Channels) -> dict[int, int]:
    """Return the new axes of convolutions that get new groups, with how many there were."""
    counts = {name: n for name, n in old.convolution_groups.items() if n}
    return {
        index: counts[axis.tensor]
        for index, axis in enumerate(new.axes)
        if counts.get(axis.tensor, 0) < new.convolution_groups.get(axis.tensor, 0)
        and axis.tensor in counts
    }


def _in_order(
    count: int, old_buckets: Mapping[int, IntArray], new_buckets: Mapping[int, IntArray]
) -> tuple[IntArray, list[int]]:
    """Return which tied channels each of the new ones continue, of each signature in order.

    Returns:
        For each of ``count`` channels, the first of new tied ones, the first of the old ones, else
        -1; and one of each signature of which there are too few new ones.
    """
    continued = np.full(count, -1, dtype=np.int64)
    oversubscribed = []
    for kind, members in old_buckets.items():
        places = new_buckets.get(kind, members[:0])
        continued[places[: len(members)]] = members[: len(places)]
        if len(members) > len(places):
            oversubscribed.append(int(members[0]))
    return continued, oversubscribed


def kinds(channels: Channels) -> tuple[list[IntArray], IntArray]:
    """Return the channels of a run by what they touch and what is done to them.

    Returns:
        Channels of one signature together, and, for each row, its place among those of its axis
        and channel: rows of the same place correspond.
    """
    codes, history = range(len(channels.axes)), _numbered(channels)
    hashes = _row_hashes(channels, codes, history)
    signature = _signatures(channels, codes, {}, history, hashes)
    return list(_buckets(tied_channels(channels, {}, signature)).values()), channels.ranks(hashes)


def _without(channels: Channels, norms: Mapping[str, int]) -> Channels:
    """Return channels whose signatures do not tell in which groups of some norms they are."""
    if not norms:
        return channels
    left = {name: n for name, n in channels.norm_groups.items() if name not in norms}
    return replace(channels, norm_groups=left)


def _torn(runs: tuple[Channels, Channels], norms: Iterable[str], channel: int) -> Obstacle:
    """Return what is in the way of a group of a norm where no new group has the same channels."""
    old, _ = runs
    norm = layer_of(next(name for name in norms if channel in old.of_norm(name)))
    rows = np.flatnonzero(old.channel == channel)
    codes = np.unique(old.axis_of_row[rows]).tolist()
    return Obstacle(
        f"at this width, groups of {norm} would be made of other channels than now, because what "
        f"else these channels pass lays them out otherwise{told_groups(runs, codes)}",
        name=layer_of(old.axes[codes[0]].tensor),
        way_out="Try a width at which the groups of all these layers fit, or grouped count.",
    )


def _name(channels: Channels, some: IntArray) -> str:
    """Return a name for channels: the first position of a parameter that carries the first."""
    if not len(some):
        return ""
    row = int(np.argmax(channels.channel == some[0]))
    axis = channels.axes[int(channels.axis_of_row[row])]
    return f"{axis.tensor} {axis.dim} {int(channels.position_of_row[row])}"


def _buckets(found: Tied) -> dict[int, IntArray]:
    """Return the tied channels of each signature, by the first of them, ascending."""
    firsts = np.flatnonzero(found.first == np.arange(len(found.first)))
    order = firsts[np.argsort(found.signature[firsts], kind="stable")]
    kinds, begins = np.unique(found.signature[order], return_index=True)
    return dict(zip(kinds.tolist(), np.split(order, begins[1:]), strict=True))


def _alone(found: Tied, buckets: Mapping[int, IntArray]) -> dict[int, IntArray]:
    """Return those of some buckets that are tied to no others."""
    return {kind: members for kind, members in buckets.items() if found.size[members[0]] == 1}
