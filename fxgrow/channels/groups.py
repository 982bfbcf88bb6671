"""Channel groups: sets of channels that must change width together.

Two writer axes are coupled when they share a channel (a residual addition did that); the connected
components of that relation are the groups.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt

from fxgrow.channels.channels import Channels
from fxgrow.labels.forest import IntArray, components
from fxgrow.labels.pins import Pin
from fxgrow.labels.space import Axis
from fxgrow.modules.tensors import layer_of

Kind = Literal["hidden", "stream", "pinned"]


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that change width together.

    Attributes:
        name: fully qualified name of the first writer, unlike that of any other group.
        width: number of rows of the first writer: of channels, but for those that have several
            rows there (an attention head, the two halves of a gate).
        kind: ``hidden``, ``stream`` (carried by a residual addition) or ``pinned``.
        pin: why it is pinned, None otherwise.
        writers, carriers, readers: layers, in order of execution.
        channels: the channels, in the order of the first writer's rows.
        rows: the channel of each row of the first writer.
        axes: every axis that holds some of them.
        followed_at: the width at which it was followed, where that is not its own: one of no
            channel or of one is told from what is broadcast at another width.
    """

    name: str
    width: int
    kind: Kind
    pin: Pin | None
    writers: tuple[str, ...]
    carriers: tuple[str, ...]
    readers: tuple[str, ...]
    channels: IntArray
    rows: IntArray
    axes: tuple[int, ...]
    followed_at: int | None = None

    @property
    def followed(self) -> int:
        """The width at which it was followed, which most have themselves."""
        return self.width if self.followed_at is None else self.followed_at

    @property
    def absent(self) -> IntArray:
        """The channels that were followed and that the network does not have."""
        return self.channels[self.width :] if self.followed_at is not None else self.channels[:0]

    def ratio(self, widths: Mapping[str, int]) -> Fraction:
        """Return what new widths, by group name, are of the one at which it was followed."""
        return Fraction(widths.get(self.name, self.width), max(self.followed, 1))

    @property
    def reason(self) -> str:
        """Why it is pinned, as a text; "" otherwise."""
        return "" if self.pin is None else str(self.pin)

    @property
    def described_width(self) -> str:
        """The width, as ``"12 × 192 rows"`` where each channel has several rows."""
        count = len(np.unique(self.rows))
        if count == self.followed or self.width < 2:
            return str(self.width)
        whole = self.width % count == 0
        return f"{count} × {self.width // count} rows" if whole else f"{count} in {self.width} rows"


def find_groups(channels: Channels, streams: IntArray) -> tuple[ChannelGroup, ...]:
    """Return all channel groups, in the order in which they are first written.

    Args:
        channels: the resolved channels of a run.
        streams: the channels that a residual addition carries.

    Returns:
        Every group that some parameter writes, pinned ones included.
    """
    owner = np.full(channels.count, -1, dtype=np.int64)  # the first axis that writes each channel
    written = np.asarray([role == "writer" for role in channels.roles], dtype=bool)
    rows = np.flatnonzero(written[channels.axis_of_row])
    owner[channels.channel[rows[::-1]]] = channels.axis_of_row[rows[::-1]]  # the last one stays
    coupled = (owner[channels.channel[rows]], channels.axis_of_row[rows], "")
    first_axis = components(len(channels.axes), [coupled])[written]
    parts: list[list[int]] = [[] for _ in np.unique(first_axis)]
    part_of = np.full(len(channels.axes) + 1, -1, dtype=np.int64)  # owner -1 has no part
    part_of[:-1][written] = np.unique(first_axis, return_inverse=True)[1]
    for axis in np.flatnonzero(written).tolist():
        parts[part_of[axis]].append(axis)
    group_of = part_of[owner]
    axes_of: list[list[int]] = [[] for _ in parts]
    for axis, index in _pairs(channels.axis_of_row, group_of[channels.channel]):
        if index >= 0:
            axes_of[index].append(axis)
    on_stream = np.zeros(channels.count, dtype=bool)
    on_stream[streams] = True
    pinned_as = np.full(channels.count, len(channels.pins))
    pinned_as[list(channels.pins)] = np.arange(len(channels.pins))
    names = _names([channels.axes[part[0]] for part in parts])
    return tuple(
        _group(
            channels, name, _distinct_channels(channels, part), axes, part[0], pinned_as, on_stream
        )
        for name, axes, part in zip(names, axes_of, parts, strict=True)
    )


def _pairs(first: IntArray, second: IntArray) -> list[tuple[int, int]]:
    """Return the distinct pairs of two arrays of numbers from −1, sorted."""
    base = int(second.max(initial=0)) + 2
    codes = first * base + second + 1
    fresh = np.ones(len(codes), dtype=bool)
    fresh[1:] = codes[1:] != codes[:-1]  # an axis is a run or a few
    codes = np.unique(codes[fresh])
    return list(zip((codes // base).tolist(), (codes % base - 1).tolist(), strict=True))


def _distinct_channels(channels: Channels, axes: Sequence[int]) -> IntArray:
    """Return the channels of some axes, in the order in which they come there."""
    rows = np.concatenate([channels.of_axis(axis) for axis in axes])
    if (rows[1:] > rows[:-1]).all():  # most are: channels are numbered in order of first use
        return rows
    _, first = np.unique(rows, return_index=True)
    return rows[np.sort(first)]


def _names(first_writers: Sequence[Axis]) -> list[str]:
    """Return a name for each group: the layer that writes it first, if it writes no other group.

    Where it does (the layers of an LSTM, a list of parameters), the tensor, and where one tensor
    writes two groups, its dim as well.
    """
    layers = [layer_of(axis.tensor) for axis in first_writers]
    of_layer, of_tensor = Counter(layers), Counter(axis.tensor for axis in first_writers)
    return [
        layer
        if of_layer[layer] == 1
        else axis.tensor
        if of_tensor[axis.tensor] == 1
        else f"{axis.tensor}[{axis.dim}]"
        for layer, axis in zip(layers, first_writers, strict=True)
    ]


def group_of_channel(channels: Channels, groups: Sequence[ChannelGroup]) -> IntArray:
    """Return the index of each channel's group, -1 where it has none.

    The array has one entry more than there are channels, so that channel -1 ("none") has no group.
    """
    group_of = np.full(channels.count + 1, -1, dtype=np.int64)
    for index, group in enumerate(groups):
        group_of[group.channels] = index
    return group_of


def _group(
    channels: Channels,
    name: str,
    members: IntArray,
    axes: list[int],
    first: int,
    pinned_as: IntArray,
    on_stream: npt.NDArray[np.bool_],
) -> ChannelGroup:
    first_pinned = int(members[np.argmin(pinned_as[members])])  # others may follow from that
    pin = channels.pins.get(first_pinned)
    layers: dict[str, dict[str, None]] = {"writer": {}, "carrier": {}, "reader": {}}
    for axis in axes:
        layers[channels.roles[axis]].setdefault(layer_of(channels.axes[axis].tensor))
    writers = tuple(layers["writer"])
    carriers = tuple(c for c in layers["carrier"] if c not in layers["writer"])
    kind: Kind = "stream" if on_stream[members].any() else "hidden"
    return ChannelGroup(
        name=name,
        width=channels.axes[first].size,
        kind=kind if pin is None else "pinned",
        pin=pin,
        writers=writers,
        carriers=carriers,
        readers=tuple(layers["reader"]),
        channels=members,
        rows=channels.of_axis(first),
        axes=tuple(axes),
    )


def kinds_of(groups: Sequence[ChannelGroup]) -> list[list[str]]:
    """Return the names of groups, side by side where their layers differ in numbers alone."""
    kinds: dict[tuple[frozenset[str], ...], list[str]] = {}
    for group in groups:
        layers = group.writers, group.carriers, group.readers
        alike = tuple(frozenset(re.sub(r"\d+", "#", name) for name in names) for names in layers)
        kinds.setdefault(alike, []).append(group.name)
    return list(kinds.values())
