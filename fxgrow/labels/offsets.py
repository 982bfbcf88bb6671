"""Numbers that a network adds to a parameter before it is used: a norm multiplies by 1 + weight.

What such a parameter stands for is the sum: that is what is split over copies, made zero, or takes
a factor.
"""

from __future__ import annotations

from fxgrow.labels.operators import operator_name, traits_of
from fxgrow.labels.tape import Tape, Value


def offset_of(tape: Tape, value: Value) -> float | None:
    """Return the number by which a value is larger than the one parameter that it is made of.

    Args:
        tape: the operations that made it.
        value: a parameter, or what was computed of it.

    Returns:
        The number, 0 if it is the parameter itself; None if something else was done to it.
    """
    offset = 0.0
    while not value.parameter:
        if value.producer is None or not value.is_weight:
            return None
        op = tape.operations[value.producer]
        if len(op.inputs) != 1:
            return None
        if operator_name(op.target) == "aten.add":
            number = op.args[1]
            if not isinstance(number, (int, float)) or op.kwargs.get("alpha", 1) != 1:
                return None
            offset += number
        elif op.is_rounded or not traits_of(op.target).is_movement:
            return None
        value = op.inputs[0]
    return offset


def offsets_of(tape: Tape) -> dict[str, float]:
    """Return the number that is added to each parameter, of those with one and the same each time.

    Args:
        tape: the operations of a run.
    """
    found: dict[str, set[float]] = {}
    for op in tape.operations:
        if any(value.is_weight for value in op.outputs):
            continue
        for value in op.inputs:
            if value.is_weight and len(value.origins) == 1:
                found.setdefault(value.origins[0], set()).add(offset_of(tape, value) or 0.0)
    return {name: min(given) for name, given in found.items() if len(given) == 1 and given != {0.0}}
