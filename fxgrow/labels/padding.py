"""What the new channels of a group hold on their way through a run, from writers to readers.

Where the writers write the mean of the old channels, or zeros, :class:`PaddingFlow` is the state
that the rules of the operations read and write. An operation without a rule is asked
(:mod:`fxgrow.labels.ask`): what is linear and treats all channels alike passes the mean on, and
what makes zero of zero keeps zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fxgrow.labels import ask
from fxgrow.labels.forest import IntArray
from fxgrow.labels.layers import Layer, core, cover, support
from fxgrow.labels.operators import traits_of
from fxgrow.labels.space import Axis, Role
from fxgrow.labels.tape import Operation, Value

Holds: TypeAlias = Literal["mean", "zero"]


@dataclass(frozen=True)
class ChannelTable:
    """The channel of every label of a run.

    Attributes:
        axes: the axes, in order of first use.
        roles: per axis; what no operation gave a role is a carrier.
        channel_of_label: the channel of each label, -1 where it has none.
    """

    axes: tuple[Axis, ...]
    roles: tuple[Role, ...]
    channel_of_label: IntArray

    def of_layers(self, layers: Iterable[Layer]) -> IntArray:
        """Return the channels that some label layers stand for, sorted."""
        found = [self.channel_of_label[core(x, support(x)).numpy().ravel()] for x in layers]
        joined = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *found]))
        return joined[joined >= 0]

    def of_axis(self, axis: int) -> IntArray:
        """Return the channel of each position of an axis."""
        found = self.axes[axis]
        return self.channel_of_label[found.start : found.start + found.size]


@dataclass(frozen=True)
class Held:
    """What the new channels of a value hold.

    Attributes:
        what: the mean of the old channels, zero, or None for anything else.
        why: where that was lost ("" if it was not).
    """

    what: Holds | None
    why: str = ""


@dataclass
class PaddingFlow:
    """The new channels of one group on their way through a run.

    Attributes:
        table: the channels of the run.
        channels: those of the group, each once.
        axes: the axes (indices) that hold some of them.
        holds: what its writers write.
        gradient_later: zeros go on where no gradient comes back, which is followed afterwards, and
            no further than to two of them multiplied by one another.
        filled: axes that have to be filled with it.
        free: reader axes, and whether the new channels are zero at all that they read.
        reasons: of the reader axes that are not free, why.
        flat: operations that have no slope at zero, and why.
        statistics: operations that average squares over the group.
        refusal: why a norm, or another operation over the channels, would not get what it needs.
    """

    table: ChannelTable
    channels: IntArray
    axes: tuple[int, ...]
    holds: Holds
    gradient_later: bool = False
    filled: set[int] = field(default_factory=set)
    free: dict[int, bool] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    flat: dict[int, str] = field(default_factory=dict)
    statistics: list[int] = field(default_factory=list)
    refusal: str = ""
    part: ClassVar[Literal["padding"]] = "padding"
    _held: dict[int, Held] = field(default_factory=dict)
    _carries: dict[int, bool] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        """Whether the answer is no."""
        return bool(self.refusal)

    def refuse(self, why: str) -> Held:
        """Give the answer no, for a reason that ends a sentence."""
        self.refusal = self.refusal or why
        return Held(None, why)

    @cached_property
    def _is_member(self) -> npt.NDArray[np.bool_]:
        """Whether each channel is one of the group's; one entry more, for "no channel"."""
        is_member = np.zeros(len(self.table.channel_of_label) + 1, dtype=bool)
        is_member[self.channels] = True
        return is_member

    @cached_property
    def _axes(self) -> dict[str, tuple[int, ...]]:
        """The group's axes by tensor."""
        axes: dict[str, tuple[int, ...]] = {}
        for index in self.axes:
            name = self.table.axes[index].tensor
            axes[name] = (*axes.get(name, ()), index)
        return axes

    def channels_of(self, layer: Layer) -> IntArray:
        """Return the channels of a layer, one for each of its positions; -1 for none."""
        channels: IntArray = self.table.channel_of_label[core(layer, support(layer)).numpy()]
        return channels.ravel()

    def carries(self, value: Value) -> bool:
        """Return whether a value has any of the group's channels."""
        found = self._carries.get(value.index)
        if found is None:
            found = any(self.touches(self.channels_of(layer)) for layer in value.layers)
            self._carries[value.index] = found
        return found

    def carriers(self, op: Operation) -> list[Value]:
        """Return the operands that have any of the group's channels, in order."""
        return [value for value in op.inputs if self.carries(value)]

    def touches(self, channels: IntArray) -> bool:
        """Return whether any of these channels is the group's."""
        return bool(self._is_member[channels].any())

    def is_alone(self, channels: IntArray) -> bool:
        """Return whether these channels are all the group's."""
        return bool(self._is_member[channels].all())

    def is_whole(self, channels: IntArray) -> bool:
        """Return whether these are all the group's channels, each once, and nothing else."""
        count = len(self.channels)
        return len(channels) == count == len(np.unique(channels)) and self.is_alone(channels)

    def of(self, value: Value) -> Held:
        """Return what a value's new channels hold; a parameter's are filled as the writers' are."""
        if value.parameter:
            held = self._of_whole(value, Held(self.holds), "it is a part of them")
            others = f"{value.parameter} has others besides them"
            return held if self._fills_whole(value) else Held(None, others)
        return self._held.get(value.index, Held(None, "it is computed in an unknown way"))

    def _of_whole(self, value: Value, held: Held, why: str) -> Held:
        """Return what is held, or that it is lost: the mean of a part is not the mean of all."""
        if held.what != "mean":
            return held
        found = self.table.of_layers(value.layers)
        whole = np.count_nonzero(self._is_member[found]) == len(self.channels)
        return held if whole else Held(None, why)

    def _fills_whole(self, value: Value) -> bool:
        """Return whether each of a parameter's axes has all the channels once, or needs no mean."""
        axes = [axis for name in value.origins for axis in self._axes.get(name, ())]
        return self.holds != "mean" or all(self.is_whole(self.table.of_axis(x)) for x in axes)

    def axes_of(self, value: Value, role: Role) -> list[int]:
        """Return the group's axes with a role, of the parameters that a value depends on."""
        roles = self.table.roles
        return [i for name in value.origins for i in self._axes.get(name, ()) if roles[i] == role]

    def fill(self, value: object) -> None:
        """Have what a value of parameters adds to new channels filled as the writers' rows are."""
        if isinstance(value, Value):
            self.filled.update(self.axes_of(value, "carrier"))

    def lost(self, op: Operation) -> Held:
        """Return what is held after an operation that does not pass it on."""
        what = "the mean of channels" if self.holds == "mean" else "a channel of zeros"
        return Held(None, f"{op.place} changes {what}")

    def along(self, value: Value, dims: set[int]) -> IntArray | None:
        """Return the channels along some dims of a value, if the group's are among them."""
        layers = [cover(value.layers, dim) for dim in sorted(dims)]
        for layer in layers:
            if layer is not None and support(layer) <= dims:
                found = self.channels_of(layer)
                if self.touches(found):
                    return found
        return None

    def concerns(self, op: Operation) -> bool:
        """Return whether an operation gets any of the group's channels, not a dtype alone."""
        return not traits_of(op.target).is_factory and any(map(self.carries, op.inputs))

    def record(self, op: Operation, fact: Held) -> None:
        """Keep what the new channels of an operation's outputs hold."""
        for value in op.outputs:
            self.hold(value, self._of_whole(value, fact, self.lost(op).why))

    def hold(self, value: Value, held: Held) -> None:
        """Know what the new channels of a value hold."""
        self._held[value.index] = held

    def generic(self, op: Operation) -> Held:
        """Return what is held after an operation without a rule, which is asked."""
        if traits_of(op.target).is_movement and not op.is_rounded:
            return joined(self, op)
        if any(self.axes_of(v, role) for v in op.inputs for role in ("writer", "reader")):
            return layer_padding(self, op)
        carriers = self.carriers(op)
        held = self.of(carriers[0])
        if not any(self.carries(value) for value in op.outputs):
            return self.refuse(f"{op.name} is computed over them")
        if held.why:
            return held
        data = [value for value in carriers if not value.is_weight]
        return self._mean(op, data) if held.what == "mean" else self._zeros(op, data)

    def _mean(self, op: Operation, data: list[Value]) -> Held:
        """Return what is held after an operation on a mean: linear, and alike, it passes it on."""
        inside = self._dims(data)
        passes = len(data) == 1 and ask.is_linear(op, data)
        passes = passes and ask.is_alike(op, data, inside, self._dims(op.outputs[:1]))
        return Held("mean") if passes else self.lost(op)

    def _dims(self, values: Iterable[Value]) -> list[int]:
        """Return the dims of some values in which the group's channels lie."""
        layers = [layer for value in values for layer in value.layers]
        own = [support(x) for x in layers if self.touches(self.channels_of(x))]
        return sorted(frozenset().union(*own))

    def _zeros(self, op: Operation, data: list[Value]) -> Held:
        """Return what is held after an operation on zeros: what it makes of them tells."""
        found = ask.at_zero(op, data)
        if found is None:
            return Held(None, f"what {op.place} makes of a channel of zeros cannot be told")
        if not math.isfinite(found.value):
            return self.refuse(f"{op.place} makes {found.value} of a channel of zeros")
        if found.value:
            return Held(None, f"{op.place} makes {found.value:.6g} of a channel of zeros")
        if not found.slope:
            self.flat[op.index] = f"{op.place} has no slope at zero and stops the gradient"
            # An RMSNorm averages squares, which have no slope at zero, and need none there.
            if not (self.gradient_later or ask.degrees(op, data)[:1] == (2.0,)):
                return Held(None, self.flat[op.index])
        return Held("zero")


def joined(flow: PaddingFlow, op: Operation) -> Held:
    """Return what is held by what is joined: the same in all; parameters are filled accordingly."""
    carriers = flow.carriers(op)
    states = [flow.of(value) for value in carriers]
    first = next((state for state in states if state.why), states[0])
    if any(state.what != first.what for state in states) and not first.why:
        return Held(None, f"{op.place} joins them with normalised ones")
    weights = [value for value in carriers if value.is_weight]
    if len(weights) < len(carriers):
        for value in weights:
            flow.fill(value)
    return first


def zero_times(flow: PaddingFlow, op: Operation, states: Sequence[Held]) -> Held | None:
    """Return what a product holds of whose factors some are zero, or None if none is.

    Several may not be, if a gradient has to come back later: the slope for each is zero then.

    Args:
        flow: the state.
        op: the product.
        states: what its factors hold, those that are data.
    """
    zeros = [held for held in states if held.what == "zero"]
    if flow.gradient_later and len(zeros) > 1:
        return flow.refuse(
            f"{op.place} multiplies channels of zeros by one another, so that none of them ever "
            "gets a gradient"
        )
    return zeros[0] if zeros else None


def layer_padding(flow: PaddingFlow, op: Operation, *, apart: bool = False) -> Held:
    """Return what is held after a layer: what its weight writes is filled, what it reads is noted.

    Args:
        flow: the state.
        op: a product with a weight, or a look-up in one.
        apart: parts of what it writes read different channels, and so do not sum over the same.
    """
    states = [flow.of(value) for value in flow.carriers(op) if not value.is_weight]
    weights = [value for value in flow.carriers(op) if value.is_weight]
    _note_readers(flow, op, states)
    if not any(map(flow.carries, op.outputs)):
        return Held(None)
    axes = [axis for value in weights for axis in flow.axes_of(value, "writer")]
    if not axes:
        return _passed(flow, op, states, weights)
    whole = not apart and all(flow.is_whole(flow.table.of_axis(axis)) for axis in axes)
    fits = {flow.of(value).what for value in weights} == {flow.holds}
    if not fits or not (whole or flow.holds == "zero"):
        return flow.lost(op)
    flow.filled.update(axes)
    for value in weights:
        flow.fill(value)
    return Held(flow.holds)


def _note_readers(flow: PaddingFlow, op: Operation, states: Sequence[Held]) -> None:
    """Note whether all is zero that the group's readers in an operation read."""
    zero = bool(states) and all(held.what == "zero" for held in states)
    why = next((held.why for held in states if held.why), f"{op.place} reads them by themselves")
    for axis in (axis for value in op.inputs for axis in flow.axes_of(value, "reader")):
        flow.free[axis] = flow.free.get(axis, True) and zero
        if not zero:
            flow.reasons.setdefault(axis, why)


def _passed(
    flow: PaddingFlow, op: Operation, states: Sequence[Held], weights: Sequence[Value]
) -> Held:
    """Return what is held after a product over another dim, or by a kernel for each channel."""
    if len(states) == 1 and len(op.inputs) == 2 and not weights:
        return states[0]  # another dim is contracted, without a bias
    every = len(states) + len(weights) == len(op.inputs)
    zero = zero_times(flow, op, states) if every else None
    if zero is None:
        return next((held for held in states if held.why), flow.lost(op))
    # A depthwise kernel and its bias accompany them, or it is of heads.
    biases = [value for value in weights if value is not op.args[1]]
    if biases and flow.holds != "zero":
        return flow.lost(op)
    for value in biases:
        flow.fill(value)
    return zero
