"""Numbers that code makes of a width: an embedding times √d, logits over √d.

Where such a number changes with the width, so does what it multiplies, by one factor. Whoever
writes that takes the inverse: a table, a layer, or the weight of a norm.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from fxgrow.channels.analysis import Analysis
from fxgrow.grow.norms.eta import Eta
from fxgrow.grow.norms.gains import owed_for, propagate_gains
from fxgrow.grow.norms.payers import Payers, Payment, depending, joined
from fxgrow.labels.operators import operator_name
from fxgrow.labels.tape import Operation, Tape, Value

_MOST = 64  # ways to share the factors inside of one module that are tried
_MOST_PARTS = 4096
_FLOAT32 = 5e-7  # a few roundings in float32
_WITH_ALPHA = ("aten.addmm", "aten.baddbmm")


class Number(NamedTuple):
    """A number that an operation computes with, which is another one at other sizes.

    Attributes:
        op: the operation, at the old sizes.
        before, after: its numbers, as many; not all of them are equal.
        factor: by what it multiplies more than it did; None if it is no factor.
    """

    op: Operation
    before: tuple[float, ...]
    after: tuple[float, ...]
    factor: float | None

    def __str__(self) -> str:
        pairs = zip(self.before, self.after, strict=True)
        old, new = next(pair for pair in pairs if pair[0] != pair[1])
        return (
            f"{self.op.place} computes with {old:.6g} at the present widths and with "
            f"{new:.6g} at the new ones: the code makes a number of a width, and no weight "
            "takes that up"
        )


@dataclass(frozen=True)
class Scales:
    """What goes into the propagation of gains on account of numbers that follow a width.

    Attributes:
        numbers: by operation (tape index), what it multiplies by in terms of what it did.
        factors: factor by name, of the weights that take it up and of scalars that follow.
        owed: factor by name of a norm's weight.
        undone: sources of gains that the next weight takes up.
    """

    numbers: dict[int, float] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    owed: dict[str, float] = field(default_factory=dict)
    undone: frozenset[str] = frozenset()


def changed_numbers(old: Tape, new: Tape) -> list[Number] | None:
    """Return the numbers that are others at other sizes, of operations on data or parameters.

    Args:
        old: a run at the old sizes.
        new: one at the new sizes.

    Returns:
        In order; None where the runs differ in operations.
    """
    runs = _on_data(old), _on_data(new)
    if len({tuple(op.target for op in run) for run in runs}) > 1:
        return None
    payers = Payers(old)
    return [
        Number(before, was, becomes, _factor(payers, before, was, becomes))
        for before, after in zip(*runs, strict=True)
        if (was := _numbers(before)) != (becomes := _numbers(after)) and len(was) == len(becomes)
    ]


def _on_data(tape: Tape) -> list[Operation]:
    """Return the operations on data or parameters; what else a graph computes may be left out."""
    known = depending(tape)
    return [op for op in tape.operations if any(value.index in known for value in op.inputs)]


def _numbers(op: Operation) -> tuple[float, ...]:
    """Return the numbers that an operation computes with."""
    if operator_name(op.target) in _WITH_ALPHA:
        return (float(op.kwargs.get("alpha", 1)), float(op.kwargs.get("beta", 1)))
    return op.numbers


def _factor(
    payers: Payers, op: Operation, was: Sequence[float], becomes: Sequence[float]
) -> float | None:
    """Return by what an operation multiplies more than it did, None if it does something else."""
    name, data = operator_name(op.target), payers.data(op)
    if name in _WITH_ALPHA:
        only_product = was[1] == becomes[1] == 0
        return becomes[0] / was[0] if only_product and was[0] and becomes[0] else None
    whole = len(was) == 1 and len(data) <= 1
    if not whole or name not in ("aten.mul", "aten.div") or 0 in (*was, *becomes):
        return None
    if op.kwargs.get("rounding_mode"):
        return None
    ratio = becomes[0] / was[0]
    if any(payers.is_constant(x) and _is_rounded(payers.tape, x) for x in op.inputs):
        ratio = _unrounded(ratio)
    first = op.args[0]
    divides = first not in data and not (isinstance(first, Value) and first.origins)
    return ratio if name == "aten.mul" or divides else 1.0 / ratio


def _is_rounded(tape: Tape, value: Value) -> bool:
    """Return whether a constant is made of a number in float32, that may be one in float64."""
    while value.producer is not None and (inputs := tape.operations[value.producer].inputs):
        value = inputs[0]
    return value.dtype.is_floating_point


def _unrounded(ratio: float) -> float:
    """Return the ratio of two numbers in float32 as the root of a fraction, if it is near one."""
    square = float(Fraction(ratio * ratio).limit_denominator(_MOST_PARTS))
    return math.copysign(math.sqrt(square), ratio) if _is_near(square, ratio * ratio) else ratio


def _is_near(first: float, second: float) -> bool:
    return math.isclose(first, second, rel_tol=_FLOAT32)


def compensated(
    analysis: Analysis,
    numbers: Sequence[Number],
    scalars: Mapping[str, float],
    eta: Eta,
    with_eps: Mapping[str, Mapping[str, float]],
    apart: Collection[int] = (),
) -> Scales | Number | None:
    """Return who takes up that some numbers change, or what nobody can take up.

    Args:
        analysis: of the network.
        numbers: those that change.
        scalars: factor by name of a parameter or buffer without dims.
        eta: what else has factors.
        with_eps: for each layer the attributes that may be its eps.
        apart: sums of products of so many terms are not looked behind.

    Returns:
        None stands for a scalar.
    """
    search = _PayerSearch(analysis, eta, with_eps, Payers(analysis.tape, apart))
    scaled: dict[int, float] = {}
    for number in numbers:
        if number.factor is None:
            return number
        scaled[number.op.index] = number.factor
    told = {number.op.index: number for number in numbers}
    used = dict(_uses(analysis.tape, scalars))
    ways: dict[str, dict[int, list[Payment]]] = {}
    for index, factor in (scaled | {i: scalars[name] for i, name in used.items()}).items():
        op = analysis.tape.operations[index]
        found = [*search.payers.ways(op, 1.0 / factor)]
        if not found:
            return told.get(index)
        ways.setdefault(op.module, {})[index] = found
    first = joined([found[0] for members in ways.values() for found in members.values()])
    whole = None if first is None else search.settled(first, scaled, scalars)
    if whole is not None:
        return whole
    chosen: list[Payment] = []
    for members in ways.values():
        inside = {index: scaled[index] for index in members if index in scaled}
        beside = {used[index]: scalars[used[index]] for index in members if index in used}
        shared = search.shared(members, inside, beside)
        if shared is None:
            return told.get(min(members))
        chosen.append(shared)
    together = joined(chosen)
    whole = None if together is None else search.settled(together, scaled, scalars)
    return whole or (numbers[0] if numbers else None)


def _uses(tape: Tape, scalars: Mapping[str, float]) -> Iterator[tuple[int, str]]:
    """Yield the operations in which data meets a scalar, and its name."""
    for op in tape.operations:
        names = [value.origins for value in op.inputs if value.is_weight]
        for name in scalars:
            if (name,) in names and len(op.inputs) == 2 and not op.outputs[0].is_weight:
                yield op.index, name


@dataclass(frozen=True)
class _PayerSearch:
    """Tries who takes factors up, by following gains."""

    analysis: Analysis
    eta: Eta
    with_eps: Mapping[str, Mapping[str, float]]
    payers: Payers

    def shared(
        self,
        members: Mapping[int, Sequence[Payment]],
        numbers: Mapping[int, float],
        scalars: Mapping[str, float],
    ) -> Payment | None:
        """Return how the factors inside of one module are shared, None if they cannot be."""
        for payments in itertools.islice(itertools.product(*members.values()), _MOST):
            together = joined(payments)
            if together is not None and self.settled(together, numbers, scalars):
                return together
        return None

    def settled(
        self, payment: Payment, numbers: Mapping[int, float], scalars: Mapping[str, float]
    ) -> Scales | None:
        """Return a payment beside what it is for, None if that leaves a gain anywhere."""
        eta, analysis = self.eta, self.analysis
        whole = Payment({**scalars}).beside(payment)
        if whole is None:
            return None
        factors = times(whole.factors, eta.factors)
        owed = owed_for(analysis.silenced, factors, whole.owed)
        undone = frozenset(whole.factors) | whole.later
        flow = propagate_gains(
            analysis.tape, factors, self.with_eps, eta.statistics, eta.undone | undone,
            owed=owed, numbers=numbers,
        )  # fmt: skip
        if flow.mismatches or (flow.absorbed and not eta.statistics):
            return None
        return Scales({**numbers}, whole.factors, whole.owed, undone)


def times(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """Return the products of factors, by name."""
    names = dict.fromkeys((*first, *second))
    return {name: first.get(name, 1.0) * second.get(name, 1.0) for name in names}
