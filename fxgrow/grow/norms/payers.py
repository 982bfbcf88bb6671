"""Who can take a factor up, so that what an operation returns is multiplied by it.

Whoever writes what goes in can: a table, a layer, the weight of a norm. Where two computed things
are multiplied, as queries and keys are, either one can, or both by its root; where they are added,
all must.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from fxgrow.labels import ask
from fxgrow.labels.operators import aten, operator_name, traits_of
from fxgrow.labels.tape import Operation, Tape, Value

_SUMS = aten("add sub cat stack")
_WEIGHT_OF_NORM = {
    "aten.native_layer_norm": 2, "aten.native_group_norm": 1,
    **dict.fromkeys(aten("native_batch_norm cudnn_batch_norm _native_batch_norm_legit"), 1),
}  # fmt: skip
_MOST = 8  # ways to share one factor that are told


@dataclass(frozen=True)
class Payment:
    """Factors that are taken up.

    Attributes:
        factors: by name, of weights that write, and of scalars that follow a width.
        owed: by name, of the weights of norms.
        later: modules whose numbers are taken up by what reads behind them.
    """

    factors: dict[str, float] = field(default_factory=dict)
    owed: dict[str, float] = field(default_factory=dict)
    later: frozenset[str] = frozenset()

    def beside(self, other: Payment) -> Payment | None:
        """Return both payments, None where a tensor would take two different factors."""
        factors, owed = self.factors | other.factors, self.owed | other.owed
        both = [(factors, self.factors), (owed, self.owed)]
        agree = all(math.isclose(new[name], x) for new, old in both for name, x in old.items())
        return Payment(factors, owed, self.later | other.later) if agree else None

    def times(self, other: Payment) -> Payment:
        """Return what both take together, where either may be of the same tensors."""
        pairs = (self.factors, other.factors), (self.owed, other.owed)
        factors, owed = ({n: a.get(n, 1.0) * b.get(n, 1.0) for n in {**a, **b}} for a, b in pairs)
        return Payment(factors, owed, self.later | other.later)


Ways: TypeAlias = Iterator[Payment]


def depending(tape: Tape) -> frozenset[int]:
    """Return the indices of the values that depend on inputs or parameters."""
    found = set[int]()
    for value in tape.values:
        made_of = () if value.producer is None else tape.operations[value.producer].inputs
        given = value.is_input or bool(value.origins)
        if given or any(x.index in found for x in made_of if x.index < value.index):
            found.add(value.index)
    return frozenset(found)


@dataclass(frozen=True)
class Payers:
    """Looks for those that can take factors up.

    Attributes:
        tape: the operations.
        apart: sums of products of so many terms are not looked behind.
        kept: weights that take nothing, so that what goes into their layers must.
    """

    tape: Tape
    apart: Collection[int] = ()
    kept: Collection[str] = ()
    _depending: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_depending", depending(self.tape))

    def data(self, op: Operation) -> list[Value]:
        """Return the operands that depend on an input, each once."""
        values = dict.fromkeys(op.inputs)
        return [v for v in values if not v.is_weight and v.index in self._depending]

    def is_constant(self, value: Value) -> bool:
        """Return whether a value depends on neither inputs nor parameters."""
        return value.index not in self._depending

    def ways(self, op: Operation, factor: float) -> Ways:
        """Yield ways in which the output of an operation takes a factor, the simplest first.

        One layer may write both factors of a product that is behind: then it takes the root.
        """
        for each in (factor, math.sqrt(factor)):
            yield from itertools.islice(self._through(op, each), _MOST)
        yield Payment(later=frozenset({op.module}))

    def directly(self, op: Operation, factor: float) -> Ways:
        """Yield ways in which the output of an operation takes a factor, without any other."""
        yield from self._through(op, factor)

    def _of(self, value: Value, factor: float) -> Ways:
        """Yield ways in which a value takes a factor."""
        if value.is_weight:
            yield from _paid([value], factor)
        elif value.producer is not None:
            yield from self._through(self.tape.operations[value.producer], factor)

    def _through(self, op: Operation, factor: float) -> Ways:
        name, data = operator_name(op.target), self.data(op)
        weights = [value for value in op.inputs if value.is_weight and value.layers]
        if name in _WEIGHT_OF_NORM:
            yield from _paid([op.args[_WEIGHT_OF_NORM[name]]], factor, of_norm=True)
        elif name == "aten.embedding" or not data:
            yield from _paid(weights, factor)
        elif name in _SUMS:
            yield from self._all(data, factor)
        elif weights:
            yield from self._by_weights(op, weights, data, factor)
        elif len(data) == 1:
            power = self._power(op, data[0])
            if power:
                yield from self._of(data[0], factor ** (1.0 / power))
        elif len(data) == 2 and (traits_of(op.target).is_product or name == "aten.mul"):
            yield from self._either(op, data, factor)

    def _by_weights(
        self, op: Operation, weights: Sequence[Value], data: Sequence[Value], factor: float
    ) -> Ways:
        """Yield ways for a layer: by its weight, or before it where the weight is to be kept."""
        if traits_of(op.target).is_product and len(data) == 1:  # behind its bias, if it has one
            own = [v for v in weights if v is not _bias(op)]
            if self.kept and {*self.kept}.issuperset(n for v in own for n in v.origins):
                yield from self._of(data[0], factor)
            else:
                yield from _paid(own, factor)
        elif operator_name(op.target) == "aten.mul":
            yield from _paid(weights, factor, of_norm=True)

    def _power(self, op: Operation, value: Value) -> float | None:
        """Return the power with which an operation takes a factor on its one operand."""
        if traits_of(op.target).is_movement or ask.is_linear(op, [value]):
            return 1.0
        powers = ask.degrees(op, [value])
        return powers[0] if powers else None

    def _either(self, op: Operation, data: Sequence[Value], factor: float) -> Ways:
        """Yield ways for a product: its first factor, its second, both."""
        if traits_of(op.target).is_product and data[0].shape[-1] in self.apart:
            return
        yield from self._of(data[0], factor)
        yield from self._of(data[1], factor)
        yield from self._all(data, math.sqrt(factor))

    def _all(self, data: Sequence[Value], factor: float) -> Ways:
        """Yield ways in which several values take one factor, each of them."""
        each = [[*itertools.islice(self._of(value, factor), _MOST)] for value in data]
        for payments in itertools.product(*each):
            if (together := joined(payments)) is not None:
                yield together


def joined(payments: Sequence[Payment]) -> Payment | None:
    """Return several payments as one, None where a tensor would take two different factors."""
    found: Payment | None = Payment()
    for payment in payments:
        found = found and found.beside(payment)
    return found


def _bias(op: Operation) -> object:
    """Return what a product adds, if it does."""
    name = operator_name(op.target)
    return (
        op.args[0] if name == "aten.addmm" else op.args[2] if name == "aten.convolution" else None
    )


def _paid(weights: Sequence[object], factor: float, *, of_norm: bool = False) -> Ways:
    """Yield the payment by a weight, if it is one parameter."""
    found = [value for value in weights if isinstance(value, Value) and len(value.origins) == 1]
    if len(found) == 1 and len(weights) == 1 and not found[0].is_curved:
        taken = {found[0].origins[0]: factor}
        yield Payment(owed=taken) if of_norm else Payment(taken)
