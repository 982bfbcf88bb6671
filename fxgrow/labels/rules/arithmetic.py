"""Sums and products, entry by entry: where gains must agree, and what multiplies zeros."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fxgrow.labels.gains import Absorbed, Gain, GainFlow, agree, same
from fxgrow.labels.padding import Held, PaddingFlow, joined, zero_times
from fxgrow.labels.rules.record import RULES, OpRule
from fxgrow.labels.tape import Operation, Value


def _number(op: Operation) -> float:
    """Return the number that is added to a tensor, 0 if it is another tensor."""
    given = [x for x in op.args[:2] if isinstance(x, (int, float))]
    return float(given[0]) if given else 0.0


def sum_gain(flow: GainFlow, op: Operation) -> Gain:
    """All gains must agree; what an RMSNorm adds to its mean of squares is an eps, and follows."""
    number = _number(op)
    data = [value for value in op.inputs if not value.is_weight]
    if number and len(data) == 1:
        followed = _eps_follows(flow, op, number, flow.of(data[0]))
        if followed is not None:
            return followed
    return agree(flow, op, constant=_told(number, op.inputs) if number else "")


def _told(number: float, beside: Sequence[Value]) -> str:
    """Return what a number is that is added to tensors, and that no attribute holds."""
    kinds = {v.dtype for v in beside if v.dtype.is_floating_point} | {torch.float32}
    if number in {torch.finfo(kind).eps for kind in kinds}:
        return (
            f"the eps of its dtype, which eps=None stands for and cannot follow (set eps={number!r}"
            " there, which computes the same, and it will)"
        )
    return "a constant that no attribute holds"


def _eps_follows(flow: GainFlow, op: Operation, eps: float, gain: Gain) -> Gain | None:
    """Let the eps that an RMSNorm adds to its mean of squares take the gain s² of these.

    Returns:
        The gain of the sum, or None if what is added is no eps.
    """
    held = flow.eps_of(op.module, eps)
    if held is None:
        return None
    attribute, eps = held
    root = Gain(math.sqrt(gain.scale), gain.sources)
    taken = flow.taken_before(op.module, root)
    if taken is None and root.scale != 1.0:
        norm = Absorbed(op.module, root.scale, eps, gain.sources, attribute=attribute)
        flow.absorbed[op.module] = norm
    if taken is None or same(taken.scale, root.scale):
        return gain
    own = Gain(taken.scale**2, gain.sources | taken.sources)
    why = f"{op.module} is used twice, with different gains"
    flow.part_ways(op, op.inputs[0], Gain(gain.scale / own.scale, own.sources), "no", why)
    return own


def product_gain(flow: GainFlow, op: Operation, *, reads: bool | None = None) -> Gain:
    """The product of all gains.

    Args:
        flow: the state.
        op: the operation.
        reads: whether a weight in it reads channels, and may take up what should go no further;
            by default it does in a norm, and as a layer scale it does not.
    """
    weights = [value for value in op.inputs if value.is_weight]
    gain = Gain()
    for value in op.inputs:
        gain = gain if value.is_weight else gain.times(flow.of(value))
    if len(weights) == 1 and (op.module in flow.undone if reads is None else reads):
        gain = flow.undo(weights[0], gain)
    for value in weights:
        gain = gain.times(flow.of(value)).times(flow.paid(value))
    return gain


def sum_padding(flow: PaddingFlow, op: Operation) -> Held:
    """The same in all that is added, and nothing else besides zeros."""
    held = joined(flow, op)
    others = len(op.inputs) > len(flow.carriers(op))
    return flow.lost(op) if held.what == "zero" and (others or _number(op)) else held


def product_padding(flow: PaddingFlow, op: Operation) -> Held:
    """A factor that is the same for all channels passes; zero times anything is zero."""
    carriers = flow.carriers(op)
    data = [flow.of(value) for value in carriers if not value.is_weight]
    zero = zero_times(flow, op, data) if data else None
    return _scaled(flow, op, carriers, data or [flow.of(value) for value in carriers], zero)


def quotient_padding(flow: PaddingFlow, op: Operation) -> Held:
    """The same for what is divided; what divides has no zeros."""
    carriers = flow.carriers(op)
    zeros = [v for v in carriers[1:] if not v.is_weight and flow.of(v).what == "zero"]
    if op.args[0] is not carriers[0] or zeros:
        return flow.lost(op)
    held = flow.of(carriers[0])
    if op.kwargs.get("rounding_mode") and held.what == "mean":
        return flow.lost(op)
    return _scaled(flow, op, carriers, [held], held if held.what == "zero" else None)


def _scaled(
    flow: PaddingFlow, op: Operation, carriers: list[Value], states: list[Held], zero: Held | None
) -> Held:
    """Return what is held after factors that may differ from channel to channel."""
    if zero is not None and any(not value.is_weight for value in carriers):
        return zero
    if len(carriers) == 1:
        return states[0]
    return next((held for held in states if held.why), flow.lost(op))


RULES.register("aten.add", "aten.sub")(OpRule(gain=sum_gain, padding=sum_padding))
RULES.register("aten.mul")(OpRule(gain=product_gain, padding=product_padding))
RULES.register("aten.div")(OpRule(padding=quotient_padding))
