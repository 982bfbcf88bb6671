"""Numbers that code makes of a width: an embedding times √d, logits over √d.

Where such a number changes with the width, so does what it multiplies, by one factor. Whoever
writes that takes the inverse: a table, a layer, or the weight of a norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fxgrow.channels.analysis import Analysis
from fxgrow.grow.norms.eta import Eta
from fxgrow.grow.norms.gains import owed_for, propagate_gains
from fxgrow.labels import ask
from fxgrow.labels.operators import operator_name, traits_of
from fxgrow.labels.tape import Operation, Tape, Value


@dataclass(frozen=True)
class Scales:
    """What goes into the propagation of gains on account of numbers that follow a width.

    Attributes:
        numbers: by operation (tape index), what it multiplies by in terms of what it did.
        factors: factor by name, of the weights that take it up and of scalars that follow.
        owed: factor by name of a norm's weight.
    """

    numbers: dict[int, float] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    owed: dict[str, float] = field(default_factory=dict)


def changed_numbers(old: Tape, new: Tape) -> dict[int, float] | None:
    """Return by which factor operations multiply more than they did, for those that do.

    Args:
        old: a run at the old sizes.
        new: one at the new sizes.

    Returns:
        None where the runs differ in operations, or in numbers that are no factors.
    """
    if [op.target for op in old.operations] != [op.target for op in new.operations]:
        return None
    found: dict[int, float] = {}
    for before, after in zip(old.operations, new.operations, strict=True):
        traits = traits_of(before.target)
        if not traits.is_pointwise or traits.is_layout:
            continue
        was, becomes = (_numbers(op) for op in (before, after))
        if was == becomes:
            continue
        name = operator_name(before.target)
        whole = len(was) == len(becomes) == len(before.inputs) == 1
        if not whole or name not in ("aten.mul", "aten.div") or 0 in (*was, *becomes):
            return None
        if name == "aten.div" and not isinstance(before.args[0], Value):
            return None
        ratio = becomes[0] / was[0]
        found[before.index] = ratio if name == "aten.mul" else 1.0 / ratio
    return found


def _numbers(op: Operation) -> list[float]:
    """Return the numbers among the arguments of an operation, in order."""
    given = (*op.args, *op.kwargs.values())
    return [x for x in given if isinstance(x, (int, float)) and not isinstance(x, bool)]


def compensated(
    analysis: Analysis,
    numbers: Mapping[int, float],
    scalars: Mapping[str, float],
    eta: Eta,
    with_eps: Mapping[str, Mapping[str, float]],
) -> Scales | None:
    """Return who takes up that some numbers change, or None if nobody can.

    Args:
        analysis: of the network.
        numbers: factor by operation.
        scalars: factor by name of a parameter or buffer without dims.
        eta: what else has factors.
        with_eps: for each layer the attributes that may be its eps.
    """
    operations = analysis.tape.operations
    found = Scales(dict(numbers), dict(scalars))
    scaled = dict(numbers)
    for op in operations:
        names = [value.origins for value in op.inputs if value.is_weight]
        for name, factor in scalars.items():
            if (name,) in names and len(op.inputs) == 2 and not op.outputs[0].is_weight:
                scaled[op.index] = factor
    for index, factor in scaled.items():
        if not _take_up(analysis.tape, operations[index], 1.0 / factor, found):
            return None
    factors = times(found.factors, eta.factors)
    owed = owed_for(analysis.silenced, factors, found.owed)
    flow = propagate_gains(
        analysis.tape, factors, with_eps, eta.statistics, eta.undone | found.factors.keys(),
        owed=owed, numbers=found.numbers,
    )  # fmt: skip
    return None if flow.mismatches or (flow.absorbed and not eta.statistics) else found


def times(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """Return the products of factors, by name."""
    names = dict.fromkeys((*first, *second))
    return {name: first.get(name, 1.0) * second.get(name, 1.0) for name in names}


def _take_up(tape: Tape, op: Operation, factor: float, found: Scales) -> bool:
    """Let whoever writes what an operation multiplies take a factor; return whether one can."""
    while True:
        data = [value for value in op.inputs if not value.is_weight]
        if len(data) != 1 or data[0].producer is None:
            return False
        op = tape.operations[data[0].producer]
        name, traits = operator_name(op.target), traits_of(op.target)
        weights = [value for value in op.inputs if value.is_weight and value.layers]
        inner = [value for value in op.inputs if not value.is_weight]
        if name == "aten.embedding":
            return _set(found.factors, weights, factor)
        if name == "aten.native_layer_norm":
            return _set(found.owed, [op.args[2]], factor)
        if weights and len(inner) == 1 and traits.is_product:  # behind its bias, if it has one
            return _set(found.factors, [v for v in weights if v is not _bias(op)], factor)
        if weights and name == "aten.mul":
            return _set(found.owed, weights, factor)
        if weights or len(inner) != 1:
            return False
        if not (traits.is_movement or ask.is_linear(op, inner)):
            return False


def _bias(op: Operation) -> object:
    """Return what a product adds, if it does."""
    name = operator_name(op.target)
    return (
        op.args[0] if name == "aten.addmm" else op.args[2] if name == "aten.convolution" else None
    )


def _set(factors: dict[str, float], weights: Sequence[object], factor: float) -> bool:
    """Give one weight a factor, in place; return whether it is a parameter and had no other one."""
    found = [value for value in weights if isinstance(value, Value) and len(value.origins) == 1]
    if len(found) != 1 or len(weights) != 1:
        return False
    return factors.setdefault(found[0].origins[0], factor) == factor
