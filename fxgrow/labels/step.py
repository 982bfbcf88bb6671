"""What a rule gets and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxgrow.labels import ask
from fxgrow.labels.ask import OpCall
from fxgrow.labels.layers import Layer, Layers, along, core, cover, narrowed, support
from fxgrow.labels.operators import Traits
from fxgrow.labels.pins import PinKind
from fxgrow.labels.space import Fill, LabelSpace
from fxgrow.labels.tape import Value
from fxgrow.modules.calling import map_tensors


@dataclass  # not frozen: that takes as long as all else in making one
class Step:
    """One operation on its way through the labeller.

    A rule turns it into the layers of each output tensor. It may unify labels, mark the roles of
    parameter axes, and pin what it cannot reason about.

    Attributes:
        space: where labels are made, unified and pinned.
        target: the ATen operator.
        traits: what the operator is, whatever its arguments.
        args, kwargs: its arguments (meta tensors).
        operands: the tensors among them, in order.
        outputs: the tensors it returned.
        value: the recorded value of a tensor argument.
        place: where it ran, for reasons: ``"aten.cumsum at layer1.0"``.
        positions: by output, the channels among which it tells positions; to be filled.
        is_curved: of an operation on weights, whether there is an axis along which it is linear in
            none of them; None if that has not been looked at.
        stands_for: the parameter that the first output reads and writes in place of, "" if none.
    """

    space: LabelSpace
    target: OpOverload
    traits: Traits
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    operands: Sequence[Tensor]
    outputs: tuple[Tensor, ...]
    value: Callable[[Tensor], Value]
    place: str
    positions: dict[int, tuple[tuple[Layer, str], ...]] = field(default_factory=dict)
    is_curved: bool | None = None
    stands_for: str = ""

    @cached_property
    def call(self) -> OpCall:
        """The operation with a value for each tensor, to be asked."""
        args, kwargs = map_tensors(self.value, (self.args, self.kwargs))
        return OpCall(self.target, args, kwargs)

    @property
    def own_facts(self) -> dict[str, Any]:
        """What the first output has for itself, as attributes of its value."""
        if not self.stands_for:
            return {}
        return {"parameter": self.stands_for, "origins": (self.stands_for,), "is_curved": False}

    def ignores_copies(self, tensor: Tensor, dims: Sequence[int]) -> bool:
        """Return whether the result stays as it is if all along some dims is there twice."""
        return ask.ignores_copies(self.call, self.value(tensor), dims)

    def argument(self, name: str, default: Any = None) -> Any:
        """Return an argument by its name in the operator's schema."""
        place = self.traits.places.get(name, len(self.args))
        return self.args[place] if place < len(self.args) else self.kwargs.get(name, default)

    def layers(self, tensor: Tensor) -> Layers:
        """Return the label layers of a tensor argument."""
        return self.value(tensor).layers

    def line(self, tensor: Tensor, dim: int) -> Tensor | None:
        """Return the 1-D labels of a tensor along a dim, or None where it has none there.

        Labels that differ along other dims too are unified: whoever reads a tensor along one dim
        reads them as one channel.
        """
        layer = cover(self.value(tensor).layers, dim)
        if layer is None or layer.ndim == 1:
            return layer
        if len(support(layer)) == 1:
            return layer.as_strided((layer.shape[dim],), (layer.stride(dim),))
        return self.flat(layer, (dim,)).reshape(-1)

    def flat(self, layer: Layer, dims: Iterable[int]) -> Tensor:
        """Return a layer narrowed to ``dims``, with what differs along other dims unified."""
        kept = set(dims)
        if support(layer) <= kept:
            return core(layer, kept)
        found = narrowed(layer, kept)
        whole = core(layer, support(layer))
        self.space.unify(found.expand_as(whole), whole)
        return found

    def beside(self, tensor: Tensor, dims: Iterable[int], kind: PinKind, *details: str) -> Layers:
        """Return the layers that stay within ``dims``; one that covers none of them is pinned."""
        kept = set(dims)
        found = []
        for layer in self.layers(tensor):
            if support(layer) & kept or not support(layer):
                found.append(self.flat(layer, kept))
            else:
                self.pin((layer,), kind, *details)
        return tuple(found)

    def stretched(self, tensor: Tensor, shape: Sequence[int]) -> Layers:
        """Return the layers of a tensor broadcast to ``shape``; a broadcast channel is pinned."""
        layers = self.layers(tensor)
        if tensor.shape == torch.Size(shape):
            return layers
        aligned = shape[len(shape) - tensor.ndim :]
        wider = any(
            size == 1 and full > 1 for size, full in zip(tensor.shape, aligned, strict=True)
        )
        kept = []
        for layer in layers:
            if wider and not support(layer):
                self.pin((layer,), PinKind.BROADCAST)
            else:
                kept.append(layer.expand(*shape))
        return tuple(kept)

    def met_by(self, done: str) -> str:
        """Return what is done with an operand that has no labels, and whose it is if that is known.

        Args:
            done: what is done: "combined with".
        """
        others = [value for value in map(self.value, self.operands) if not value.layers]
        drawn = ("noise that is drawn" for value in others if value.drawn == "noise")
        name = next(filter(None, (*drawn, *(value.held for value in others))), "")
        return f"{done} {name}, a tensor" if name else f"{done} a tensor"

    def join_fixed(self, layer: Layer, tensor: Tensor, shape: Sequence[int]) -> set[int]:
        """Record that ``layer`` keeps its size along the dims in which ``tensor`` has entries.

        Returns these dims. A layer with no other dim stands for no channels that could grow. Along
        dims in which the tensor is one constant, or was expanded, it has whatever size is needed.
        """
        offset = len(shape) - tensor.ndim
        dims = support(layer)
        free = {
            dim + offset
            for own in self.value(tensor).made
            for dim in support(own)
            if bool(core(own, support(own)).all())
        }
        fixed = {dim for dim in dims - free if dim >= offset and tensor.shape[dim - offset] > 1}
        if fixed:
            self.space.fix(core(layer, dims), sorted(fixed), self.met_by("combined with"))
        return fixed

    def read(self, columns: Tensor, weight: Value) -> None:
        """Mark the columns of a weight as readers; they must be linear in their parameter.

        Otherwise columns that cancel in the parameter do not cancel in the weight.
        """
        self.space.mark(columns, "reader")
        if weight.is_curved:
            named = " and ".join(weight.origins)
            self.pin((columns,), PinKind.CURVED, named)

    def contract(self, incoming: Tensor | None, weight: Tensor, dim: int, groups: int = 1) -> None:
        """Let a weight read the channels that come in along one of its dims.

        Args:
            incoming: their labels, as :meth:`line` returns them.
            weight: the weight.
            dim: the dim of it that is contracted with them.
            groups: of a convolution, whose weight has the columns of one group.
        """
        columns = self.line(weight, dim)
        if not self.value(weight).is_weight:
            both = tuple(labels for labels in (columns, incoming) if labels is not None)
            self.pin(both, PinKind.ACTIVATIONS)
            return
        if groups > 1:
            size = groups * weight.shape[dim]
            columns = self.space.axis(self.value(weight).parameter, dim, size, groups)
        if columns is not None:
            self.read(columns, self.value(weight))
            if incoming is not None:
                self.space.unify(columns, incoming)
        elif incoming is not None:
            self.pin((incoming,), PinKind.FIXED, self.met_by("multiplied by"))

    def write(self, weight: Tensor, dim: int, out: int, bias: Tensor | None = None) -> Layers:
        """Return the channels that a weight writes along a dim of the first output.

        Args:
            weight: the weight.
            dim: the dim of it that is there in the output, too.
            out: that dim of the output.
            bias: what is added to each of them.
        """
        rows = self.line(weight, dim)
        self.accompany(bias, rows, "draw")
        if rows is None:
            return ()
        if self.value(weight).is_weight:
            self.space.mark(rows, "writer")
        return (along(rows, out, self.outputs[0].shape),)

    def unify(self, left: Tensor | None, right: Tensor | None) -> None:
        """Let channels of two operands be one, position by position, as :meth:`line` returns them.

        If one operand has none, it is of fixed width, and so the other's are pinned.
        """
        if left is not None and right is not None:
            self.space.unify(left, right)
        else:
            alone = tuple(labels for labels in (left, right) if labels is not None)
            self.pin(alone, PinKind.FIXED, self.met_by("combined with"))

    def accompany(self, vector: Tensor | None, channels: Tensor | None, fill: Fill) -> None:
        """Unify a per-channel vector (bias, norm weight, statistic) with the channels it serves.

        Args:
            vector: along its last dim, an entry for each channel; its axis is a *carrier*.
            channels: their labels, as :meth:`line` returns them.
            fill: what its new entries are: ``draw`` (by the init), ``one``, ``zero``, or ``copy``.
        """
        if vector is None:
            return
        if channels is None:
            self.pin(self.layers(vector), PinKind.FIXED, self.met_by("combined with"))
            return
        line = self.line(vector, len(vector.shape) - 1)
        if line is not None:
            self.space.unify(line, channels)
            self.space.mark(line, "carrier", fill)
        elif vector.shape[-1] > 1:
            self.space.fix(channels, (0,), "combined with a vector")

    def accompany_each(self, vector: Tensor | None, layer: Layer, dim: int, fill: Fill) -> None:
        """Let a vector along ``dim`` serve a layer that varies in more: heads, each alike.

        If every head is one channel, the vector keeps its size; else its channels are the layer's.
        """
        line = None if vector is None else self.line(vector, 0)
        if line is not None:
            whole = core(layer, support(layer))
            self.space.share(whole, along(line, dim, whole.shape), (dim,))
            self.space.mark(line, "carrier", fill)

    def pin(self, layers: Layers, kind: PinKind, *details: str) -> None:
        """Pin every channel of ``layers``; details fill the sentence of the kind."""
        for layer in layers:
            self.space.pin(core(layer, support(layer)), kind, *details)

    def give_up(self, kind: PinKind, *details: str) -> tuple[Layers, ...]:
        """Pin all that goes in and return unlabelled outputs."""
        for tensor in self.operands:
            self.pin(self.layers(tensor), kind, *details)
        return tuple(() for _ in self.outputs)
