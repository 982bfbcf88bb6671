"""Numbers that the code of a network makes of its width: √d, 1/√d, kept or computed in a forward.

A class that is built anew at the new width computes them anew. So they follow the width, as
attributes do, if the weights can take up what comes of it: see :mod:`fxgrow.grow.norms.scales`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import nn

from fxgrow.labels.tape import Tape
from fxgrow.plan.edits import ModuleEdit

_POWERS = (0.5, -0.5)
_CLOSE = 1e-6  # of scalars in float32


def follows_width(value: float, width: int) -> float | None:
    """Return the power of a width that a number is, None if it is none that occurs.

    Example:
        >>> follows_width(4.0, 16), follows_width(0.25, 16), follows_width(3.0, 16)
        (0.5, -0.5, None)
    """
    powers = (p for p in _POWERS if math.isclose(value, float(width) ** p, rel_tol=_CLOSE))
    return next(powers, None)


def number_edits(
    standin: nn.Module, tape: Tape, widths: Mapping[int, int]
) -> Iterator[tuple[ModuleEdit, ...]]:
    """Yield attributes that may be a number that follows a width, those of one name together.

    Args:
        standin: the network.
        tape: a run of it; where it computes with no such number, no attribute is one.
        widths: new width by present one.
    """
    given = {x for op in tape.operations for x in (*op.args, *op.kwargs.values())
             if isinstance(x, (int, float))}  # fmt: skip
    for before, after in widths.items():
        computed = any(follows_width(x, before) is not None for x in given)
        found: dict[str, list[ModuleEdit]] = {}
        for name, module in standin.named_modules():
            for attribute, value in vars(module).items():
                number = _followed(value, before, after, computed=computed)
                if number is not None:
                    edit = ModuleEdit(name, attribute, value, number)
                    found.setdefault(attribute, []).append(edit)
        yield from map(tuple, found.values())


def _followed(value: object, before: int, after: int, *, computed: bool) -> int | float | None:
    """Return what an attribute becomes if it follows a width; None if it does not."""
    if type(value) is int and value == before and computed:
        return after
    if type(value) is float and (power := follows_width(value, before)) is not None:
        return math.pow(after, power)
    return None


def scalar_factors(scalars: Mapping[str, float], widths: Mapping[int, int]) -> dict[str, float]:
    """Return the factor of each tensor without dims that follows a width, by name.

    Args:
        scalars: their values.
        widths: new width by present one.
    """
    found: dict[str, float] = {}
    for name, value in scalars.items():
        for before, after in widths.items():
            power = follows_width(value, before)
            if power is not None:
                found[name] = (after / before) ** power
    return found
