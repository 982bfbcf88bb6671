"""The labels of one run: which parameter axis each stands for, and which are one channel."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fxgrow.labels.compositions import Compositions
from fxgrow.labels.forest import Forest, IntArray, Union
from fxgrow.labels.layers import Layer
from fxgrow.labels.pins import Pin, PinKind

Role: TypeAlias = Literal["writer", "reader", "carrier"]
Fill: TypeAlias = Literal["draw", "one", "zero", "copy"]


@dataclass(slots=True)  # not frozen: that takes as long as all else in making one
class Axis:
    """A parameter or buffer axis with a label for each position.

    Attributes:
        tensor: fully qualified name of the parameter or buffer; "" for places in activations.
        dim: the dim of that tensor.
        groups: for a grouped convolution, the axis is read as (groups, size // groups); the input
            axis of its weight then has ``groups * weight.shape[1]`` positions.
        start: the label of position 0.
        size: number of positions.
    """

    tensor: str
    dim: int
    groups: int
    start: int
    size: int


@dataclass(frozen=True)
class Normed:
    """A weight in two parts: a direction, which is divided by its norm, times a length.

    New entries of the direction change its norm, and none of the weight's if the length follows.

    Attributes:
        direction, length: names of the parameters.
        dim: the dim of the direction whose positions have a norm and a length each; None where
            there is one for all of it.
    """

    direction: str
    length: str
    dim: int | None

    def of(self, direction: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the length for a direction of some shape."""
        if self.dim is None:
            return ()
        return tuple(size if dim == self.dim else 1 for dim, size in enumerate(direction))


@dataclass
class LabelSpace:
    """Hands out labels for parameter axes and records what the operations say about them.

    Nothing is resolved while the network runs: unions, roles and pins are appended as arrays and
    worked out once, vectorised, by :meth:`roots`.

    Attributes:
        place: the operation that is running, kept with what it unifies: ``"aten.add at layer1.0"``.
        unions: for each call that unified something, both sides' labels and the place.
    """

    axes: list[Axis] = field(default_factory=list)
    roles: dict[int, Role] = field(default_factory=dict)  # index of axis -> role
    fills: dict[int, Fill] = field(default_factory=dict)  # index of axis -> fill of new entries
    convolution_groups: dict[str, int] = field(
        default_factory=dict
    )  # weight -> groups, 0 depthwise
    pins: list[tuple[IntArray, Pin]] = field(default_factory=list)
    tied: list[tuple[IntArray, Pin]] = field(default_factory=list)  # axes that write and read
    mixers: list[tuple[IntArray, str, str]] = field(default_factory=list)
    fixed: list[tuple[IntArray, tuple[int, ...], Pin]] = field(default_factory=list)
    heads: list[tuple[IntArray, Pin]] = field(default_factory=list)
    history: list[tuple[str, Layer]] = field(default_factory=list)  # in order of execution
    shared: list[tuple[IntArray, IntArray, tuple[int, ...], str]] = field(default_factory=list)
    norm_groups: dict[str, int] = field(default_factory=dict)  # weight of a group norm -> groups
    normed: dict[str, Normed] = field(default_factory=dict)  # by the names of both parts
    trained: set[str] = field(default_factory=set)  # parameters; others are buffers
    composed: Compositions = field(default_factory=Compositions)
    place: str = ""
    unions: list[Union] = field(default_factory=list)
    numbered: int = 0  # positions of constants that have a number; see :mod:`fxgrow.labels.made`
    met: list[tuple[IntArray, IntArray]] = field(default_factory=list)  # such numbers, labels
    reading: list[bool] = field(default_factory=list)  # for each, whether these are columns
    _index: dict[tuple[str, int, int], int] = field(default_factory=dict)
    _starts: list[int] = field(default_factory=list)
    _next: int = 1
    _forest: Forest = field(default_factory=Forest)
    _known: int = 0  # number of unions that the forest knows of
    _numbers: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))
    _array: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # the same
    _room: int = 0  # entries of _numbers
    _at: int = 0  # where they lie

    def reserve(self, count: int) -> None:
        """Make room for so many more labels at once; there can be more all the same."""
        if self._next + count > self._room:  # what was given out before stays as it is
            self._room = self._next + count
            self._numbers = torch.arange(self._room, dtype=torch.int32)
            self._array = self._numbers.numpy()
            self._at = self._numbers.data_ptr()

    def axis(
        self, tensor: str, dim: int, size: int, groups: int = 1, fill: Fill | None = None
    ) -> Tensor:
        """Return the labels of an axis, shape ``(size,)``, the same at each call.

        How its new entries begin is ``fill``, if that is known whatever the axis is used for.
        """
        start = self._start(tensor, dim, size, groups, fill)
        return self._numbers[start : start + size]

    def layer(
        self, tensor: str, dim: int, shape: tuple[int, ...], fill: Fill | None = None
    ) -> Layer:
        """Return the labels of an axis as a layer of a tensor of the given shape."""
        start = self._start(tensor, dim, shape[dim], 1, fill)
        strides = [0] * len(shape)
        strides[dim] = 1
        return self._numbers.as_strided(shape, strides, start)

    def _start(self, tensor: str, dim: int, size: int, groups: int, fill: Fill | None) -> int:
        """Return the first label of an axis, new or known; ``_numbers`` have room for it."""
        key = (tensor, dim, groups)
        index = self._index.get(key)
        if index is None:
            index = self._index[key] = len(self.axes)
            self.axes.append(Axis(tensor, dim, groups, self._next, size))
            self._starts.append(self._next)
            self._next += size
            if fill is not None:
                self.fills[index] = fill
        start = self._starts[index]
        if start + size > self._room:
            self.reserve(self._next)
        return start

    def places(self, labels: Tensor, pieces: Sequence[int]) -> Tensor:
        """Return labels of their own for places that hold some channels several times.

        Whoever reads the places has a row for each, and so the rows of one channel are told apart
        by the piece that they come from.

        Args:
            labels: shape ``(places,)``; 0 where there is no channel.
            pieces: how many places each piece has, in order.
        """
        start = self._next
        own = self.axis("", start, labels.numel())
        own = torch.where(labels == 0, 0, own)
        self.unify(labels, own)
        ends = list(itertools.accumulate(pieces, initial=0))
        for piece, (first, last) in enumerate(itertools.pairwise(ends)):
            self.note(f"piece {piece}", own[first:last])
        return own

    def _run(self, labels: Tensor) -> tuple[int, int] | None:
        """Return first label and number of what is a run of successive labels, as an axis is.

        None if it is not, or not seen to be without looking at all of them.
        """
        offset = labels.data_ptr() - self._at
        if labels.stride() != (1,) or not 0 < offset < 4 * self._next:
            return None
        return offset // 4, labels.shape[0]

    def mark(self, labels: Tensor, role: Role, fill: Fill = "draw") -> None:
        """Record what the axes of ``labels`` are to their channels, and how new entries begin.

        The first role an axis is given stays, but that an axis which reads its channels and writes
        them too (a tied embedding) is a writer. No new entry of it could cancel itself, so it is
        pinned unless :mod:`fxgrow.channels.tied` finds what silences it; one that accompanies them
        is in any case.
        """
        if not labels.numel():
            return
        run = self._run(labels)
        low, high = (run[0], sum(run) - 1) if run else map(int, labels.aminmax())
        first = last = bisect_right(self._starts, low) - 1
        if first < 0 or high >= self.axes[first].start + self.axes[first].size:
            last = bisect_right(self._starts, high) - 1
        owners: Sequence[int] = (last,)
        if first != last or last < 0:  # over several parameters, or places without a label
            owners = [owner for owner in np.unique(self._owners(labels)).tolist() if owner >= 0]
        given = role, fill
        for owner, alike in self.composed.with_others(owners):
            role, fill = given if alike else ("carrier", "copy")
            known = self.roles.setdefault(owner, role)
            if known != role and "reader" in (known, role):
                axis = self.axes[owner]
                tied = np.arange(axis.start, axis.start + axis.size)
                if "carrier" in (known, role):
                    details = (axis.tensor, "accompanies", "no new entry of it can do both")
                    self.pins.append((tied, Pin(PinKind.TIED, details=details)))
                elif torch._C._current_graph_task_id() >= 0:  # autograd runs
                    self.pins.append((tied, Pin(PinKind.BACKWARD, self.place, (axis.tensor,))))
                else:
                    self.roles[owner] = "writer"
                    if not any(pin.details[0] == axis.tensor for _, pin in self.tied):
                        pin = Pin(PinKind.TIED, details=(axis.tensor, "writes", "nothing helps it"))
                        self.tied.append((tied, pin))
            self.fills.setdefault(owner, fill)

    def compose(self, first: Tensor, other: Tensor, *, alike: bool) -> None:
        """Record that a weight is computed of two, whose labels along an axis are given.

        Whatever the axis of the first is to its channels, that of the other is too if they are
        alike: the weight is linear in both together. Else it accompanies them.
        """
        shape = torch.broadcast_shapes(first.shape, other.shape)  # type: ignore[no-untyped-call]
        sides = [self._owners(labels.expand(shape)) for labels in (first, other)]
        self.composed.record(np.unique(np.stack(sides), axis=1).T.tolist(), alike=alike)

    def _owners(self, labels: Tensor) -> IntArray:
        """Return the index of the axis of each label, -1 for no label."""
        found: IntArray = np.searchsorted(self._starts, labels.numpy().ravel(), side="right") - 1
        return found

    def unify(self, left: Tensor, right: Tensor) -> None:
        """Record that the channels ``left[i]`` and ``right[i]`` are one. Zeros say nothing.

        Args:
            left: labels, any shape.
            right: labels of the same number of elements, in the same order.

        Raises:
            ValueError: they are not as many, which some operations do not check on meta tensors.
        """
        if left.numel() != right.numel():
            raise ValueError(f"{left.numel()} channels meet {right.numel()} in {self.place}")
        one, other = self._run(left), self._run(right)
        if one is not None and other is not None:
            if one != other:
                first, second = (self._array[at : at + size] for at, size in (one, other))
                self.unions.append((first, second, self.place))
            return
        first, second = left.numpy().ravel(), right.numpy().ravel()
        different = (first != second) & (first != 0) & (second != 0)
        if different.any():
            self.unions.append((first[different], second[different], self.place))

    def meet(self, numbers: Tensor, labels: Tensor, *, read: bool = False) -> None:
        """Record that positions of constants lie where some channels do. Zeros say nothing.

        Args:
            numbers: of the positions, any shape.
            labels: as many, in the same order.
            read: these are columns of a weight, which read the constant.
        """
        first, second = numbers.numpy().ravel(), labels.numpy().ravel()
        both = (first != 0) & (second != 0)
        if both.any():
            self.met.append((first[both], second[both]))
            self.reading.append(read)

    def join_readers(self) -> None:
        """Let columns that read a constant read the channels that it is combined with elsewhere.

        A state of zeros has as many entries as both, and at the next step it is these channels.
        """
        if not any(self.reading):
            return
        beside = np.zeros(self.numbered + 1, dtype=np.int64)
        meetings = list(zip(self.met, self.reading, strict=True))
        for (numbers, labels), reads in reversed(meetings):
            if not reads:
                beside[numbers] = labels
        for (numbers, labels), reads in meetings:
            channels = beside[numbers]
            both = (channels != 0) & (channels != labels)
            if reads and both.any():
                self.unions.append((channels[both], labels[both], self.place))

    def pin(self, labels: Tensor, kind: PinKind, *details: str) -> None:
        """Record that the running operation lets the channels of ``labels`` not change, and why."""
        ids = np.unique(labels.numpy())
        ids = ids[ids > 0]
        if len(ids):
            self.pins.append((ids, Pin(kind, self.place, details)))

    def mix(self, labels: Tensor, place: str, norm: str = "") -> None:
        """Record that an operation's result depends on all of these channels together.

        It does not change if every one of them is copied the same number of times; that of a group
        norm, whose weight is ``norm``, neither if they are joined by whole groups of others.
        """
        self.mixers.append((labels.numpy().ravel().copy(), place, norm))

    def note(self, done: str, layer: Layer) -> None:
        """Record that an operation altered the values of these channels."""
        self.history.append((done, layer))

    def fix(self, labels: Tensor, dims: Sequence[int], how: str) -> None:
        """Record that these dims of ``labels`` keep their size: something of fixed width joins.

        What does so is told by ``how``: "joined with a tensor".

        That pins the channels, unless every channel turns out to fill these dims by itself: the
        positions inside an attention head may each have a constant of their own.
        """
        pin = Pin(PinKind.FIXED, self.place, (how,))
        if all(size == 1 or dim in dims for dim, size in enumerate(labels.shape)):
            self.pin(labels, PinKind.FIXED, how)  # no dim is left for channels side by side
        elif bool((labels > 0).any()):
            self.fixed.append((labels.numpy(), tuple(dims), pin))

    def share(self, whole: Tensor, part: Tensor, dims: Sequence[int]) -> None:
        """Record that ``part``, which varies in ``dims`` alone, meets what varies in more.

        If every channel of ``whole`` turns out to fill these dims by itself (a head, of which each
        position is rotated by an angle of its own), ``part`` keeps its size, for all of them alike.
        Otherwise its channels are those that it meets.

        Args:
            whole: labels.
            part: labels of the same shape.
            dims: the dims in which ``part`` varies.
        """
        self.shared.append((whole.numpy(), part.numpy(), tuple(dims), self.place))

    def are_parts(self, parts: Normed) -> bool:
        """Record of what a weight is made; return False if either is a part of another weight.

        It could not follow both.
        """
        names = (parts.direction, parts.length)
        return all(self.normed.setdefault(name, parts) == parts for name in names)

    def several(self, labels: Tensor) -> None:
        """Record that these channels can only grow in number, so that a lone one is pinned."""
        self.heads.append((np.unique(labels.numpy()), Pin(PinKind.ONE_HEAD, self.place)))

    def roots(self) -> IntArray:
        """Return, for each label, the smallest label of its channel; shape ``(labels + 1,)``."""
        roots = self._joined().roots()
        settled = [item for item in self.shared if not _fills(roots[item[0]], item[2])]
        for whole, part, _, place in settled:
            both = (whole != 0) & (part != 0)
            self.unions.append((whole[both], part[both], place))
        self.shared = [item for item in self.shared if _fills(roots[item[0]], item[2])]
        return self._joined().roots() if settled else roots

    def is_twice(self, labels: Tensor) -> bool:
        """Return whether some labels are one channel, as far as operations have told by now."""
        found = np.sort(self._joined().find(labels[labels > 0].numpy()))
        return bool((found[1:] == found[:-1]).any())

    def _joined(self) -> Forest:
        """Return the channels of the unions so far."""
        self._forest.grow(self._next)
        self._forest.join(self.unions[self._known :])
        self._known = len(self.unions)
        return self._forest

    def pinned(self, roots: IntArray) -> tuple[tuple[IntArray, Pin], ...]:
        """Return the labels that cannot change and why, in the order of the pins' weight."""
        return (*self.pins, *self._broken(roots))

    def _broken(self, roots: IntArray) -> Iterator[tuple[IntArray, Pin]]:
        """Yield what does not fill dims of fixed size by itself, and lone heads."""
        for labels, dims, pin in self.fixed:
            if not _fills(roots[labels], dims):
                yield np.unique(labels[labels > 0]), pin
        for _, part, _, place in self.shared:  # what roots() left: each channel fills the dims
            yield np.unique(part[part > 0]), Pin(PinKind.EVERY_HEAD, place)
        for ids, pin in self.heads:
            if len(np.unique(roots[ids])) == 1:
                yield ids[ids > 0], pin


def _fills(channels: IntArray, dims: Sequence[int]) -> bool:
    """Return whether each channel fills these dims by itself."""
    first = tuple(slice(0, 1) if dim in dims else slice(None) for dim in range(channels.ndim))
    return not (channels != channels[first]).any()
