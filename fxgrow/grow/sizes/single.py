"""Layers that write no channel, or one, as a run at the network's own widths shows them.

An axis of one entry may be a channel, or may be there to be broadcast. Where the next operation
broadcasts it, that is seen at once; what is seen of nothing has to be tried at another width
(:mod:`fxgrow.grow.sizes.narrow`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property

import torch

from fxgrow.labels.operators import place_of, traits_of
from fxgrow.labels.pins import Pin, PinKind
from fxgrow.labels.tape import Operation, Tape, Value
from fxgrow.modules.tensors import layer_of

_PARTS = (1, 2, 3, 4, 6)  # into which the channels of an empty layer may be cut (a GLU)
_OUT = 1  # the dim of what a convolution or a product of matrices gives that has its channels


@dataclass(frozen=True)
class Single:
    """An axis of a weight that writes no channel, or one.

    Attributes:
        weight: fully qualified name of the weight.
        dim: its dim that writes.
        width: 0 or 1.
        operation: the place on the tape of the first operation that it writes by.
        vectors: tensors of as many entries that the operation takes besides: a bias.
        pin: why it stays, where one run shows that.
    """

    weight: str
    dim: int
    width: int
    operation: int
    vectors: tuple[str, ...]
    pin: Pin | None = None

    @property
    def layer(self) -> str:
        """The layer that owns the weight."""
        return layer_of(self.weight)


class Uses:
    """What becomes of the values of a run: who takes them, and what they are made of.

    Args:
        tape: of the run.
    """

    def __init__(self, tape: Tape) -> None:
        self._tape = tape

    @cached_property
    def _takers(self) -> dict[int, list[Operation]]:
        """The operations that take each value, by its place on the tape."""
        found: dict[int, list[Operation]] = {}
        for op in self._tape.operations:
            for value in op.inputs:
                found.setdefault(value.index, []).append(op)
        return found

    def is_read(self, op: Operation) -> bool:
        """Return whether a product takes anything that is made of what an operation gives."""
        waiting, seen = [*op.outputs], set[int]()
        while waiting:
            for taker in self._takers.get(waiting.pop().index, ()):
                if taker.index not in seen:
                    seen.add(taker.index)
                    if taker.is_product:
                        return True
                    waiting += taker.outputs
        return False

    def broadcast(self, op: Operation, dim: int) -> str:
        """Return where a dim of what an operation gives is broadcast, "" if that is not seen."""
        waiting, seen = [op.outputs[0]], set[int]()
        while waiting:
            value = waiting.pop()
            for taker in self._takers.get(value.index, ()):
                if taker.index in seen or not _keeps_dims(taker, value, dim):
                    continue
                seen.add(taker.index)
                if taker.outputs[0].shape[dim] > 1:
                    return place_of(taker.target, taker.node, taker.module)
                waiting.append(taker.outputs[0])
        return ""

    def met_by_none(self, members: dict[int, Single], some: dict[int, Single]) -> dict[int, Single]:
        """Return the layers of no channel, by operation, that meet others of none, point by point.

        Nothing is broadcast to no entry but what has one, so that these go together.

        Args:
            members: some layers, by operation.
            some: all layers that may join them, by operation.
        """
        found = dict(members)
        waiting = [x for x in members.values() if not x.width]
        while waiting:
            for value in self._meeting(self._tape.operations[waiting.pop().operation].outputs[0]):
                more = [x for x in self.sources(value, some) if x.operation not in found]
                found |= {x.operation: x for x in more}
                waiting += [x for x in more if not x.width]
        return found

    def _meeting(self, value: Value) -> Iterator[Value]:
        """Yield the values without a channel that meet what becomes of one, point by point."""
        waiting, seen = [value], set[int]()
        while waiting:
            mine = waiting.pop()
            for taker in self._takers.get(mine.index, ()):
                traits = traits_of(taker.target)
                if taker.index in seen or not traits.is_pointwise or traits.is_layout:
                    continue
                seen.add(taker.index)
                waiting += taker.outputs
                yield from (
                    x
                    for x in taker.inputs
                    if x.index != mine.index and x.shape[_OUT:] == mine.shape[_OUT:]
                )

    def sources(self, value: Value, some: dict[int, Single]) -> list[Single]:
        """Return which of some layers, by operation, wrote a value, without those before these."""
        waiting, seen = [value], set[int]()
        found: list[Single] = []
        while waiting:
            producer = waiting.pop().producer
            if producer is None or producer in seen:
                continue
            seen.add(producer)
            if producer in some:
                found.append(some[producer])
            else:
                waiting += self._tape.operations[producer].inputs
        return found


def single_layers(tape: Tape, flow: Uses) -> Iterator[Single]:
    """Yield the layers that write no channel, or one, if anything reads that; in order of use."""
    known: set[tuple[str, int]] = set()
    for op in tape.operations:
        shape = op.outputs[0].shape if op.outputs else ()
        if len(shape) < 2 or shape[_OUT] > 1:  # most have more, and this takes no time
            continue
        written = _written(op)
        if written is None or written in known or not flow.is_read(op):
            continue
        known.add(written)
        width = shape[_OUT]
        vectors = tuple(v.parameter for v in op.inputs if v.parameter and v.shape == (width,))
        yield Single(*written, width, op.index, vectors, _seen_pin(op, width, flow))


def _seen_pin(op: Operation, width: int, flow: Uses) -> Pin | None:
    """Return why the channels that an operation writes stay, where one run shows that."""
    place = place_of(op.target, op.node, op.module)
    if not width:
        # On the meta device it runs, and nowhere else.
        runs = op.name != "convolution"
        why = "a convolution that writes none (make it with one channel, which grows)"
        return None if runs else Pin(PinKind.NOT_RUN, place, (why,))
    where = flow.broadcast(op, _OUT)
    return Pin(PinKind.BROADCAST, where) if where else None


def _written(op: Operation) -> tuple[str, int] | None:
    """Return the weight by which an operation writes dim 1 of its output, and the dim of it."""
    if op.name == "convolution":
        weight, grouped = op.args[1], op.args[8] > 1
        return None if grouped or not weight.parameter else (weight.parameter, int(op.args[6]))
    if op.name not in ("mm", "addmm"):
        return None
    weight = op.args[op.name.count("add") + 1]
    if weight.parameter:
        return weight.parameter, 1
    if weight.is_weight and weight.is_view and len(weight.origins) == 1:
        return weight.origins[0], 0
    return None


def _keeps_dims(op: Operation, value: Value, dim: int) -> bool:
    """Return whether an operation gives one value in which a dim is what it was."""
    if not op.outputs or len(op.outputs[0].shape) != len(value.shape):
        return False
    traits = traits_of(op.target)
    same = op.name == "expand" or (traits.is_pointwise and not traits.is_layout)
    return same and dim < len(value.shape)


def kind_of(op: Operation) -> object:
    """Return what an operation does, alike for how torch cuts no channel and how it cuts some."""
    cuts = (torch.ops.aten.split.Tensor, torch.ops.aten.split_with_sizes.default)
    return cuts[0] if op.target in cuts else op.target


def free_width(taken: AbstractSet[int], *, parted: bool) -> int:
    """Return the least width from 3 on that no size equals, nor any that it is cut into.

    Args:
        taken: all sizes of the network.
        parted: whether the channels may be cut: one that all of 2, 3, 4 and 6 divide.
    """
    parts = _PARTS if parted else (1,)
    step = math.lcm(*parts)
    return next(
        n
        for n in itertools.count(max(step, 3), step)
        if taken.isdisjoint(n // part for part in parts)
    )
