"""Check what the public functions are called with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxgrow.errors import PlanError, UsageError
from fxgrow.plan.budget import budgeted
from fxgrow.verification.findings import Effort


def check_tensors(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return warnings on tensors, and refuse those that cannot be computed with.

    Raises:
        PlanError: a tensor is quantized, or of a dtype without arithmetic.
    """
    notes = []
    for name, tensor in tensors.items():
        if tensor.is_quantized:
            raise PlanError(
                f"{name} is quantized ({tensor.dtype}).",
                name=name,
                way_out="Widen the float network, then quantize it again.",
            )
        if not tensor.is_floating_point() or tensor.device.type == "meta":
            continue
        if tensor.dtype.itemsize < 2:
            raise PlanError(
                f"{name} is {tensor.dtype}, which has no arithmetic.",
                name=name,
                way_out="Widen the float network, then round it again.",
            )
        # A finite sum has finite terms; an infinite one may have overflowed.
        if not math.isfinite(tensor.detach().sum()) and not bool(torch.isfinite(tensor).all()):
            kind = "NaN" if bool(tensor.isnan().any()) else "infinite"
            notes.append(f"{name} has {kind} entries; they stay where they are")
    return tuple(notes)


def effort_of(verify: bool | Effort) -> Effort:
    """Return how thoroughly to measure, as one of three words.

    Raises:
        UsageError: it is something else.
    """
    if isinstance(verify, bool):
        return "full" if verify else "none"
    return one_of("verify", verify, ("full", "quick", "none"))  # type: ignore[return-value]


def checked_budget(budget: str) -> str:
    """Return a budget of parameters that can be read, or "".

    Raises:
        UsageError: it cannot be.
    """
    if budget:
        budgeted(budget, 1)
    return budget


def globs(patterns: Sequence[str]) -> tuple[str, ...]:
    """Return globs as a tuple; a lone string is one glob."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """Return a value if it is allowed.

    Raises:
        PlanError: it is not.
    """
    if value not in allowed:
        raise UsageError(f"{name} is {value!r}.", way_out=f"Known: {', '.join(allowed)}.")
    return value
