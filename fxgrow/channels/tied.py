"""Channels that one parameter both writes and reads: a table that embeds tokens and scores them.

No new entry of such a table can cancel itself. But where a weight for each channel (that of the
last norm) stands before the reader, it can silence what is read: it is zero for new channels, and
is split over the copies of old ones, so that the table may hold anything there.

That weight is found by its place in the run: all that the table reads has passed it and nothing
but linear operations since, and all that passes it goes to the table, or to readers of no other
channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fxgrow.channels.channels import Channels
from fxgrow.labels import ask
from fxgrow.labels.forest import IntArray
from fxgrow.labels.layers import support
from fxgrow.labels.offsets import offset_of
from fxgrow.labels.operators import operator_name, traits_of
from fxgrow.labels.pins import Pin, PinKind
from fxgrow.labels.tape import Operation, Tape, Value

# Where a norm has its weight and its bias among its arguments.
_NORMS = {
    "aten.native_layer_norm": (2, 3),
    "aten.native_batch_norm": (1, 2),
    "aten._native_batch_norm_legit_no_training": (1, 2),
    "aten.cudnn_batch_norm": (1, 2),
}


@dataclass(frozen=True)
class Silenced:
    """What stands before a tensor that both writes and reads some channels.

    Attributes:
        tensor: its name.
        operations: where channels are silenced (indices on the tape).
        weights: the parameters that multiply them there, by name.
        biases: the parameters that are added to them there or behind.
        readers: the axes of what else reads them behind, by (tensor, dim).
    """

    tensor: str
    operations: frozenset[int]
    weights: frozenset[str]
    biases: frozenset[str]
    readers: frozenset[tuple[str, int]]


@dataclass
class _SilencedSearch:
    """The search for what silences the channels that one tensor reads."""

    channels: Channels
    tape: Tape
    tensor: str
    members: IntArray
    weights: set[str] = field(default_factory=set)
    biases: set[str] = field(default_factory=set)
    readers: set[tuple[str, int]] = field(default_factory=set)
    found: dict[int, Operation] = field(default_factory=dict)
    _carried: dict[int, bool] = field(default_factory=dict)

    def carries(self, value: Value) -> bool:
        """Return whether a value has any of the channels."""
        found = self._carried.get(value.index)
        if found is None:
            own = self.channels.of_layers(value.layers)
            found = self._carried[value.index] = bool(np.isin(own, self.members).any())
        return found

    def data(self, op: Operation) -> list[Value]:
        """Return the operands that carry the channels and are no weights."""
        return [v for v in dict.fromkeys(op.inputs) if not v.is_weight and self.carries(v)]

    def beside(self, op: Operation) -> list[Value]:
        """Return the weights that have an entry for each channel."""
        return [v for v in dict.fromkeys(op.inputs) if v.is_weight and self.carries(v)]

    def reads(self, op: Operation) -> bool:
        """Return whether the tensor reads the channels in an operation."""
        tied = any(self.tensor in value.origins for value in op.inputs if value.is_weight)
        return tied and bool(self.data(op)) and not self.passes(op)

    def fills(self, op: Operation) -> bool:
        """Return whether the channels lie along several dims of a weight that is multiplied by."""
        layers = [layer for value in op.inputs if value.is_weight for layer in value.layers]
        return traits_of(op.target).is_product and any(
            len(support(layer)) > 1
            and np.isin(self.channels.of_layers([layer]), self.members).any()
            for layer in layers
        )

    def passes(self, op: Operation) -> bool:
        """Return whether the channels are there in what an operation computes of data."""
        return any(self.carries(value) for value in op.outputs)

    def silences(self, op: Operation) -> str:
        """Note an operation that multiplies each channel by a parameter; return why it is none."""
        if not self.passes(op) or len(self.data(op)) != 1:
            return "is no weight for each channel"
        name = operator_name(op.target)
        weights, biases = self.beside(op), list[Value]()
        if name in _NORMS:
            places = [op.args[place] for place in _NORMS[name]]
            weights, biases = ([x] if isinstance(x, Value) else [] for x in places)
        elif name != "aten.mul":
            return "is no weight for each channel"
        if len(weights) != 1 or offset_of(self.tape, weights[0]) is None:
            return "is no weight for each channel"
        if self.tensor in weights[0].origins or any(offset_of(self.tape, b) for b in biases):
            return "is no weight of its own"
        self.found[op.index] = op
        self.weights.update(weights[0].origins)
        self.biases.update(name for value in biases for name in value.origins)
        return ""

    def is_linear(self, op: Operation) -> bool:
        """Return whether the channels pass an operation one by one, by nothing but factors."""
        traits, data = traits_of(op.target), self.data(op)
        if not self.passes(op) or self.beside(op):
            return False
        if traits.is_movement and not op.is_rounded:
            return True
        if len(data) != 1 or not ask.is_linear(op, data):
            return False
        inside, outside = self.dims(data), self.dims(op.outputs[:1])
        return traits.is_pointwise or ask.is_alike(op, data, inside, outside)

    def dims(self, values: Iterable[Value]) -> list[int]:
        """Return the dims of some values in which the channels lie."""
        layers = [layer for value in values for layer in value.layers]
        own = (x for x in layers if np.isin(self.channels.of_layers([x]), self.members).any())
        return sorted(frozenset[int]().union(*map(support, own)))

    def adds(self, op: Operation) -> bool:
        """Return whether an operation adds a parameter of its own to each channel."""
        beside = self.beside(op)
        return (
            operator_name(op.target) == "aten.add"
            and len(op.inputs) == 2
            and len(self.data(op)) == len(beside) == 1
            and offset_of(self.tape, beside[0]) == 0
            and self.tensor not in beside[0].origins
        )

    def backward(self, start: Sequence[Value]) -> str:
        """Find what silences some values; return why nothing does, if so."""
        waiting, seen = [*start], set[int]()
        while waiting:
            value = waiting.pop()
            if value.index in seen:
                continue
            seen.add(value.index)
            if value.producer is None:
                return "no norm or weight for each channel stands before it"
            op = self.tape.operations[value.producer]
            why = self.silences(op)
            if not why:
                continue
            if not (self.is_linear(op) or self.adds(op)):
                return f"{op.place}, which stands before it, {why}"
            waiting.extend(self.data(op))
        return ""

    def forward(self) -> str:
        """Follow what is silenced; return why the channels cannot be, if so."""
        silent: set[int] = set()
        heard: set[str] = set()  # the parameters that read channels that are not silenced
        for op in self.tape.operations:
            data = self.data(op)
            if op.index in self.found:
                silent.update(value.index for value in op.outputs)
                continue
            quiet = [value for value in data if value.index in silent]
            if not quiet:
                heard.update(name for v in op.inputs if v.is_weight and data for name in v.origins)
                continue
            if why := self._behind(op, data, quiet):
                return why
            if self.passes(op):
                silent.update(value.index for value in op.outputs)
        own = self.weights | self.biases | {name for name, _ in self.readers}
        shared = own & heard
        return f"{min(shared)} is used elsewhere as well" if shared else ""

    def _behind(self, op: Operation, data: list[Value], quiet: list[Value]) -> str:
        """Note what takes silenced channels; return why that is none that can, if so."""
        if len(quiet) < len(data):
            return f"{op.place} joins what it reads with other channels"
        if self.reads(op) or self.is_linear(op):
            return ""
        if self.adds(op):
            self.biases.update(self.beside(op)[0].origins)
            return ""
        axes = self.reader_axes(op)
        if self.passes(op) or not axes:
            return f"{op.place} takes what it reads as well, and is not linear in each channel"
        self.readers.update(axes)
        return ""

    def reader_axes(self, op: Operation) -> set[tuple[str, int]]:
        """Return the axes of the parameters that read the channels in an operation."""
        names = {name for value in op.inputs if value.is_weight for name in value.origins}
        channels = self.channels
        return {
            (axis.tensor, axis.dim)
            for index, (axis, role) in enumerate(zip(channels.axes, channels.roles, strict=True))
            if axis.tensor in names
            and role == "reader"
            and np.isin(channels.of_axis(index), self.members).any()
        }


def find_silenced(channels: Channels, tape: Tape) -> tuple[tuple[Silenced, ...], Channels]:
    """Tell which tied channels are silenced before they are read; the others stay pinned.

    Args:
        channels: of a run.
        tape: its operations.

    Returns:
        What is silenced, and the channels with a pin for each that is not.
    """
    found: list[Silenced] = []
    pins, pinned = dict(channels.pins), list(channels.pinned)
    for labels, pin in channels.tied:
        members = np.unique(channels.channel_of_label[labels])
        members = members[members >= 0]
        if not len(members):
            continue
        search = _SilencedSearch(channels, tape, pin.details[0], members)
        reading = [value for op in tape.operations if search.reads(op) for value in search.data(op)]
        why = search.backward(reading)
        why = why or search.forward() or ("" if search.found else "nothing is read on these inputs")
        if not why:
            found.append(
                Silenced(
                    search.tensor, frozenset(search.found), frozenset(search.weights),
                    frozenset(search.biases), frozenset(search.readers),
                )
            )  # fmt: skip
            continue
        filled = None if reading else next(filter(search.fills, tape.operations), None)
        if filled is None:
            told = Pin(pin.kind, pin.place, (*pin.details[:2], why))
        else:
            told = Pin(PinKind.BOTH_SIDES, f"aten.{filled.place}", (search.tensor,))
        pinned.append((labels, told))
        for channel in members.tolist():
            pins.setdefault(channel, told)
    return tuple(found), replace(channels, pins=pins, pinned=tuple(pinned))
