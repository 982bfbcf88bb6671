"""Channel classes: which positions of which parameter axes are one and the same channel.

This is the resolved form of a :class:`~fxgrow.labels.space.LabelSpace`, as flat arrays: one row
per (axis, position), sorted by axis and position. Two runs of one network, at its old sizes and
at its new ones, are compared on these tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fxgrow.labels.forest import IntArray
from fxgrow.labels.layers import Layer, core, support
from fxgrow.labels.padding import ChannelTable
from fxgrow.labels.pins import Pin
from fxgrow.labels.rows import Rows, rows_of
from fxgrow.labels.space import Axis, Fill, LabelSpace, Normed

HashArray: TypeAlias = npt.NDArray[np.uint64]


class Mixer(NamedTuple):
    """An operation whose result depends on a set of channels as a whole.

    Attributes:
        channels: the channel of each position, -1 for what is none.
        place: where it ran.
        norm: the weight of a group norm, whose groups are sets by themselves; "" for others.
    """

    channels: IntArray
    place: str
    norm: str


@dataclass(frozen=True)
class Channels(ChannelTable):
    """The channel of every position of every labelled axis.

    Attributes:
        fills: per axis.
        channel: ``channel[start[a] + p]`` is the channel of position ``p`` of axis ``a``, an
            integer from 0 in order of first use.
        start: first row of each axis, and one entry past the last.
        count: number of channels.
        pins: why a channel cannot change, by channel.
        convolution_groups: groups of each grouped convolution's weight, 0 if depthwise.
        mixers: the operations that compute over several channels, in order.
        norm_groups: groups of each group norm, by its weight.
        normed: weights made of a direction and a length, by the names of both.
        unions: where labels became one channel: both sides' labels and the place.
        pinned: labels that cannot change, and why, the weightiest first.
        regrouped: grouped convolutions' weights whose channels are to be seen in another number of
            groups: how many there are and how many are to be, as few old ones as will do in each.
        tied: labels that one tensor both writes and reads, with the pin they have unless something
            silences what is read: see :mod:`fxgrow.channels.tied`.
        noted: for each operation that altered values, in order, what it did and to which labels.
        met: numbers of positions of constants, and the channels that lie there, for each meeting.
        numbered: how many such numbers there are.
        first_labels: the first label of each axis, of those without a channel too.
        labels: the label of each row where it does not tell its position: rows before it are of
            channels that the network does not have (:mod:`fxgrow.channels.present`).
        alike: axes of parameters that a weight is linear in together, each with the others; some
            may be used in one mode alone.
    """

    fills: tuple[Fill, ...]
    channel: IntArray
    start: IntArray
    count: int
    pins: dict[int, Pin]
    convolution_groups: dict[str, int]
    mixers: tuple[Mixer, ...]
    norm_groups: dict[str, int]
    normed: dict[str, Normed]
    unions: tuple[tuple[IntArray, IntArray, str], ...]
    pinned: tuple[tuple[IntArray, Pin], ...]
    tied: tuple[tuple[IntArray, Pin], ...] = ()
    noted: tuple[tuple[str, Layer], ...] = ()
    first_labels: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    regrouped: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    met: tuple[tuple[IntArray, IntArray], ...] = ()
    numbered: int = 0
    labels: IntArray | None = None
    alike: Mapping[int, frozenset[int]] = field(default_factory=dict)

    def of_axis(self, axis: int) -> IntArray:
        """Return the channel of each position of an axis."""
        return self.channel[self.start[axis] : self.start[axis + 1]]

    def of_norm(self, weight: str) -> IntArray:
        """Return the channels that each group of a group norm is over; shape (groups, size)."""
        places = [(axis.tensor, axis.dim) for axis in self.axes]
        return self.of_axis(places.index((weight, 0))).reshape(self.norm_groups[weight], -1)

    @cached_property
    def history(self) -> tuple[tuple[str, IntArray], ...]:
        """For each operation that altered values, in order, what it did and to which labels."""
        return tuple((done, core(x, support(x)).numpy().ravel()) for done, x in self.noted)

    @cached_property
    def rows(self) -> Rows:
        """Which labels belong to one row of their channel."""
        smallest = np.arange(len(self.channel_of_label))
        labels = np.flatnonzero(self.channel_of_label >= 0)
        _, first, channel = np.unique(
            self.channel_of_label[labels], return_index=True, return_inverse=True
        )
        smallest[labels] = labels[first][channel]
        return rows_of(self.first_labels, smallest, self.unions)

    @cached_property
    def axis_of_row(self) -> IntArray:
        """The axis of each row."""
        return np.repeat(np.arange(len(self.axes)), np.diff(self.start))

    @cached_property
    def position_of_row(self) -> IntArray:
        """The position of each row in its axis."""
        rows = np.arange(len(self.channel), dtype=np.int64)
        return rows - self.start[self.axis_of_row]

    @cached_property
    def group_of_row(self) -> IntArray:
        """The convolution group of each row; 0 where the axis is not one of a grouped one."""
        groups = np.ones(len(self.axes), dtype=np.int64)
        times = np.ones(len(self.axes), dtype=np.int64)
        for index, axis in enumerate(self.axes):
            split = self.convolution_groups.get(axis.tensor, self.norm_groups.get(axis.tensor, 0))
            if axis.tensor in self.regrouped:
                split, after = self.regrouped[axis.tensor]
                times[index] = -(-split // after)
                groups[index] = split
            elif split and axis.size % split == 0 and (axis.groups > 1 or axis.dim == 0):
                groups[index] = split
        sizes = np.diff(self.start) // groups * times
        found: IntArray = self.position_of_row // np.maximum(sizes, 1)[self.axis_of_row]
        return found

    @cached_property
    def label_of_row(self) -> IntArray:
        """The label of each row."""
        if self.labels is not None:
            return self.labels
        first = np.asarray([axis.start for axis in self.axes], dtype=np.int64)
        return first[self.axis_of_row] + self.position_of_row

    def ranks(self, row_hashes: HashArray) -> IntArray:
        """Return, for each row, how many rows of the same axis and channel come before it.

        Args:
            row_hashes: for each label a number that tells its row from others of its channel.
        """
        keys = self.axis_of_row * self.count + self.channel
        ordered = np.sort(keys)
        rank = np.zeros(len(keys), dtype=np.int64)
        again = ordered[1:][ordered[1:] == ordered[:-1]]
        if not len(again):
            return rank
        several = np.flatnonzero(np.isin(keys, again))
        keys, hashes = keys[several], row_hashes[self.label_of_row[several]]
        order = np.lexsort((self.position_of_row[several], hashes, keys))
        fresh = np.ones(len(order), dtype=bool)
        fresh[1:] = np.diff(keys[order]) != 0
        firsts = np.maximum.accumulate(np.where(fresh, np.arange(len(order)), 0))
        rank[several[order]] = np.arange(len(order)) - firsts
        return rank


def resolve(space: LabelSpace) -> Channels:
    """Return the channels of a finished run.

    Axes that no operation unified or gave a role (a convolution's kernel dims) are left out. A
    grouped convolution's weight is described by its split input axis, not by its plain dim 1.
    """
    roots = space.roots()
    joined = roots != np.arange(len(roots))
    joined[roots[joined]] = True
    first_labels = np.asarray([axis.start for axis in space.axes], dtype=np.int64)
    met = np.concatenate([[0], np.cumsum(joined)])  # labels that met others, before each label
    ends = first_labels + np.asarray([axis.size for axis in space.axes], dtype=np.int64)
    has_met = (met[ends] > met[first_labels]).tolist()
    kept = [
        (axis, space.roles.get(index, "carrier"), space.fills.get(index, "copy"))
        for index, axis in enumerate(space.axes)
        if axis.tensor and (has_met[index] or index in space.roles)
    ]
    sizes = np.asarray([axis.size for axis, _, _ in kept], dtype=np.int64)
    start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    within = np.arange(start[-1]) - np.repeat(start[:-1], sizes)
    described = np.zeros(len(roots), dtype=bool)
    described[np.repeat([axis.start for axis, _, _ in kept], sizes).astype(np.int64) + within] = (
        True
    )
    first = described & (roots == np.arange(len(roots)))  # the smallest label of each channel
    channel_of_label = np.where(first, np.cumsum(first) - 1, -1)[roots]
    pinned = space.pinned(roots)
    pins: dict[int, Pin] = {}
    for labels, pin in pinned:
        for channel in np.unique(channel_of_label[labels]).tolist():
            if channel >= 0:
                pins.setdefault(channel, pin)
    return Channels(
        axes=tuple(axis for axis, _, _ in kept),
        roles=tuple(role for _, role, _ in kept),
        fills=tuple(fill for _, _, fill in kept),
        channel=channel_of_label[described],
        start=start,
        count=int(first.sum()),
        pins=pins,
        convolution_groups=dict(space.convolution_groups),
        channel_of_label=channel_of_label,
        mixers=tuple(_mixers(space, channel_of_label)),
        norm_groups=dict(space.norm_groups),
        normed=dict(space.normed),
        unions=tuple(space.unions),
        pinned=pinned,
        tied=tuple(space.tied),
        noted=tuple(space.history),
        first_labels=first_labels,
        met=tuple((numbers, channel_of_label[labels]) for numbers, labels in space.met),
        numbered=space.numbered,
        alike=_alike(space, [axis for axis, _, _ in kept]),
    )


def _alike(space: LabelSpace, kept: Sequence[Axis]) -> dict[int, frozenset[int]]:
    """Return which axes a weight is linear in together, by their places among those kept."""
    places = {(axis.tensor, axis.dim): place for place, axis in enumerate(kept)}
    found: dict[int, frozenset[int]] = {}
    for first, others in space.composed.others.items():
        own = [space.axes[index] for index in (first, *(x for x, alike in others.items() if alike))]
        members = [places[a.tensor, a.dim] for a in own if (a.tensor, a.dim) in places]
        for member in members:
            found[member] = found.get(member, frozenset()) | {*members} - {member}
    return found


def _mixers(space: LabelSpace, channel_of_label: IntArray) -> Iterator[Mixer]:
    """Yield what mixes several channels: a norm inside a head mixes the positions of one."""
    for labels, place, norm in space.mixers:
        members = channel_of_label[labels]
        if len(members) == 1 or members[0] < 0 or bool((members != members[0]).any()):
            yield Mixer(members, place, norm)
