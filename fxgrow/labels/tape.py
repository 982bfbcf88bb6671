"""What a network did: its ATen operations in order, with the labels of every value."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxgrow.labels.layers import Layer, Layers
from fxgrow.labels.operators import operator_name, traits_of
from fxgrow.modules.calling import map_kind

Drawn: TypeAlias = Literal["", "truth", "mask", "choice", "uniform", "noise"]


@dataclass(eq=False, slots=True)  # not frozen: that takes as long as all else in making one
class Value:
    """One version of one tensor; nothing but ``taken`` ever changes.

    Attributes:
        index: its place on the tape's ``values``.
        shape, dtype: of the tensor.
        layers: its label layers.
        producer: index of the operation that computed it, or None for inputs and parameters.
        parameter: fully qualified name if it is a parameter or buffer, or a weight whose direction
            is one, else "".
        is_weight: it depends on parameters and constants alone.
        is_input: it is an input of the network.
        origins: the parameters and buffers it depends on, where ``is_weight``.
        is_view: it is a view of another value.
        is_uniform: one constant everywhere (zeros, ones), of whatever size.
        number: the constant that it is everywhere, where that is known, else None.
        is_padded: one constant at some positions of a dim with channels, beside these.
        drawn: what is drawn by chance, and made of numbers and weights besides: truth values of
            fixed probability, a mask of zeros and one other number, a choice of two others, uniform
            numbers that are to be compared, or other noise.
        is_masked: data that a mask was multiplied by.
        is_curved: computed from weights by something that is not linear in each of them, so that
            columns that cancel in a parameter do not cancel here.
        repeated: dims along which it is the same by construction: it had one entry there.
        runs: so many positions of dim 0 in a row are the same, by construction.
        positions: channels among which it tells positions (of the largest one), with the name of
            the operation: where it is used, they cannot change.
        taken: for a padded one, layers it met: they tell what its sizes stand for.
        made: numbers of the positions of constants in it, as layers
            (:mod:`fxgrow.labels.made`).
        held: fully qualified name of the plain attribute that holds it, or what else it comes from
            that a reason can tell; "" if that is not known.
    """

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    layers: Layers
    producer: int | None = None
    parameter: str = ""
    is_weight: bool = False
    is_input: bool = False
    origins: tuple[str, ...] = ()
    is_view: bool = False
    is_uniform: bool = False
    number: float | None = None
    is_padded: bool = False
    drawn: Drawn = ""
    is_masked: bool = False
    is_curved: bool = False
    repeated: frozenset[int] = frozenset()
    runs: int = 1
    positions: tuple[tuple[Layer, str], ...] | None = None
    taken: list[Layer] = field(default_factory=list)
    made: Layers = ()
    held: str = ""


@dataclass(eq=False, slots=True)  # as above; nothing ever changes
class Operation:
    """One ATen operation as it ran.

    Attributes:
        index: its place in execution order.
        target: the operator.
        node: name of the fx node that ran it ("" if the model was run without a graph).
        module: fully qualified name of the innermost module that ran it.
        args, kwargs: its arguments, every tensor replaced by its :class:`Value`.
        inputs: the values among the arguments, in order.
        outputs: the values it computed (an in-place operation computes a new value).
        numbers: those among its arguments, and in constants of one entry, if it is pointwise.
    """

    index: int
    target: OpOverload
    node: str
    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    numbers: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """The operator's name without namespace, overload and in-place mark: ``"relu"``."""
        return self.target._opname.rstrip("_")

    @property
    def is_product(self) -> bool:
        """Whether it multiplies matrices or convolves, or is counted by a formula of the user's."""
        return traits_of(self.target).is_product or self.target.overloadpacket in _registered()

    @property
    def place(self) -> str:
        """Where it ran, for reasons: ``"relu at layer1.0"``."""
        return f"{self.name} at {self.module or self.node or 'the top level'}"

    @property
    def is_rounded(self) -> bool:
        """Whether it makes integers, or truth values, of numbers."""
        return any(value.dtype.is_floating_point for value in self.inputs) and not any(
            value.dtype.is_floating_point or value.dtype.is_complex for value in self.outputs
        )

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters and buffers it uses, directly or through a view of them."""
        return tuple(dict.fromkeys(name for value in self.inputs for name in value.origins))


@dataclass
class Tape:
    """What one run did.

    Attributes:
        operations: in order.
        values: all that they got and made.
        outputs: of the network.
        by_chance: whether it drew masks.
        unread: the operations (by index) that lead to no output (:mod:`fxgrow.labels.unread`).
    """

    operations: list[Operation] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    by_chance: bool = False
    unread: frozenset[int] = frozenset()

    @property
    def read(self) -> list[Operation]:
        """The operations that lead to an output, in order."""
        return [op for op in self.operations if op.index not in self.unread]

    @property
    def flops(self) -> int:
        """The number of floating-point operations, by torch's own formulas."""
        return sum(_flops(op) for op in self.operations)


def _registered() -> dict[Any, Callable[..., Any]]:
    """Return the formulas that torch and its user have given, if any code has asked for them."""
    counter = sys.modules.get("torch.utils.flop_counter")
    return {} if counter is None else counter.flop_registry


def _flops(op: Operation) -> int:
    """Return the floating-point operations of one operation.

    The most common products are counted here: torch's counter loads a compiler, for 75 ms.
    """
    name = operator_name(op.target)
    if name == "aten.convolution":
        x, weight = op.args[:2]
        written = x if op.args[6] else op.outputs[0]  # each of its pixels takes a whole kernel
        return 2 * math.prod((*weight.shape, written.shape[0], *written.shape[2:]))
    if name in ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm"):
        inner = op.args[name.count("add")].shape[-1]
        return 2 * math.prod(op.outputs[0].shape) * int(inner)
    return _flops_by_torch(op) if op.is_product else 0


def _flops_by_torch(op: Operation) -> int:
    """Return the floating-point operations of one operation by the formula that torch has."""
    from torch.utils.flop_counter import flop_registry

    formula = flop_registry.get(op.target.overloadpacket)
    if formula is None:
        return 0
    of_shapes = getattr(formula, "__wrapped__", None)  # most take shapes, and torch wraps these
    seen: Callable[[Value], Any] = _like if of_shapes is None else operator.attrgetter("shape")
    args, kwargs = map_kind(Value, seen, (op.args, op.kwargs))
    outputs = tuple(seen(value) for value in op.outputs)
    out = outputs if len(outputs) > 1 else outputs[0]
    if of_shapes is None:
        return int(formula(*args, **kwargs, out_val=out))
    return int(of_shapes(*args, **kwargs, out_shape=out))


def _like(value: Value) -> Tensor:
    """Return an empty tensor of the shape of a value."""
    return torch.empty(value.shape, device="meta")
