"""What a pointwise operation makes of zero: the operation itself is asked, not its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxgrow.labels.operators import UNTAGGED, operator_name
from fxgrow.labels.tape import Operation, Value

# What stands in for an entry of a parameter (the slope of a PReLU): any numbers, of both signs.
_ENTRIES = (0.6875, -1.375)


@dataclass(frozen=True)
class AtZero:
    """A pointwise operation at zero.

    Attributes:
        value: what it returns there.
        slope: its derivative there, as autograd has it; 0 if it has none.
    """

    value: float
    slope: float


def at_zero(op: Operation) -> AtZero | None:
    """Return what an operation makes of zeros, by running it on one in float64.

    Args:
        op: as it ran; entries of parameters among its arguments may be any.

    Returns:
        The value and the slope at zero; None if the operation is not a pointwise one of one
        tensor of data, if they depend on the entries of parameters, or if it cannot be run.
    """
    data = [value for value in op.inputs if not value.is_weight]
    pointwise = torch.Tag.pointwise in op.target.tags or operator_name(op.target) in UNTAGGED
    if not pointwise or len(data) != 1 or torch.Tag.nondeterministic_seeded in op.target.tags:
        return None
    try:
        found = [_run(op, data[0], entry) for entry in _ENTRIES]
    except (RuntimeError, TypeError, ValueError):
        return None
    values, slopes = {value for value, _ in found}, [slope for _, slope in found]
    return AtZero(values.pop(), min(slopes, key=abs)) if len(values) == 1 else None


def _run(op: Operation, data: Value, entry: float) -> tuple[float, float]:
    """Return value and slope of an operation at zero, where parameters have this entry."""
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)

    def stand_in(argument: Any) -> Any:
        if argument is data:
            return zero.clone()  # an operation in place must not change the leaf
        if isinstance(argument, Value):
            return torch.full((1,), entry, dtype=torch.float64)
        return argument

    args, kwargs = pytree.tree_map(stand_in, (op.args, op.kwargs))
    kwargs.pop("device", None)
    with torch.enable_grad():
        out = op.target(*args, **kwargs)
    first = out[0] if isinstance(out, (tuple, list)) else out
    if not isinstance(first, Tensor):
        raise TypeError(type(first))
    if not first.requires_grad:
        return float(first), 0.0
    (slope,) = torch.autograd.grad(first.sum(), zero)
    return float(first.detach()), float(slope)
