"""Check what the public functions are called with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fxgrow.errors import PlanError, UsageError
from fxgrow.grow.data import DataDriven
from fxgrow.plan.budget import budgeted
from fxgrow.plan.by_layer import values_in
from fxgrow.plan.init import find_init
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


def checked_budget(budget: str | int) -> str:
    """Return a budget of parameters that can be read, as a text, or "".

    Raises:
        UsageError: it cannot be.
    """
    told = f"+{budget}" if type(budget) is int else str(budget)
    if told:
        budgeted(told, 1)
    return told


def globs(patterns: Sequence[str]) -> tuple[str, ...]:
    """Return globs as a tuple; a lone string is one glob.

    Raises:
        UsageError: they are something else.
    """
    if isinstance(patterns, str):
        return (patterns,)
    if isinstance(patterns, Iterable) and not isinstance(patterns, Mapping):
        found = tuple(patterns)
        if all(isinstance(pattern, str) for pattern in found):
            return found
    raise UsageError(f"{patterns!r} are no globs.", way_out="Give one glob, or a list of them.")


def number(name: str, value: object) -> float:
    """Return a number that an argument is.

    Raises:
        UsageError: it is none, such as a mapping where one number is for all layers.
    """
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"{name} is {value!r}.", way_out="Give one number, for all.") from error


def whole(name: str, value: object) -> int:
    """Return a whole number that an argument is.

    Raises:
        UsageError: it is none.
    """
    try:
        found = int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(
            f"{name} is {value!r}.", way_out="Give one whole number, for all."
        ) from error
    return int(found)


def check_sides(init: object, sides: Sequence[object]) -> None:
    """Return if inits for sides are such, and none computes rows and columns together.

    Args:
        init: the one for what no side has its own of.
        sides: those of sides.

    Raises:
        UsageError: one is by layer, there is no such init, or it computes both sides from data.
    """
    for side in sides:
        if isinstance(side, Mapping) or (isinstance(side, str) and "=" in side):
            raise UsageError(
                f"output_init and input_init are for all layers, and {side!r} is by layer.",
                way_out="Give one init; init may differ from layer to layer.",
            )
        find_init(side)  # type: ignore[arg-type]  # which refuses what is none
    by_data = [one for one in (init, *sides) if isinstance(one, DataDriven)]
    if sides and by_data:
        raise UsageError(
            f"{by_data[0].name} computes new rows and new columns together.",
            way_out="Give it as init, and leave out output_init and input_init.",
        )


def refuse_data_driven_by_layer(init: object) -> None:
    """Return if no init in a mapping computes the new weights of all layers together.

    Raises:
        UsageError: one does.
    """
    for one in values_in(init) if isinstance(init, Mapping) else ():
        if isinstance(one, DataDriven):
            raise UsageError(
                f"{one.name} computes the new weights of all layers together, and is not taken for "
                "some of them.",
                way_out="Give it as the one init, and choose what grows with include.",
            )


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """Return a value if it is allowed.

    Raises:
        PlanError: it is not.
    """
    if value not in allowed:
        raise UsageError(f"{name} is {value!r}.", way_out=f"Known: {', '.join(allowed)}.")
    return value
