"""A budget of parameters: how much larger a network may become. Needs no torch."""

from __future__ import annotations

import re
from fractions import Fraction

from fxgrow.errors import UsageError

_BUDGET = re.compile(r"\+(?P<number>\d{1,18}(\.\d{1,9})?)(?P<percent>%?)")


def budgeted(budget: str, present: int) -> int:
    """Return how many parameters a budget allows beyond those that there are.

    Args:
        budget: a part of the present ones (``"+10%"``) or a number (``"+50000"``).
        present: how many parameters the network has.

    Raises:
        UsageError: it is neither, or allows nothing.

    Example:
        >>> budgeted("+10%", 11_181_642), budgeted("+2.5%", 1000), budgeted("+50000", 1000)
        (1118164, 25, 50000)
    """
    match = _BUDGET.fullmatch(budget.strip()) if isinstance(budget, str) else None
    number = Fraction(match["number"]) if match else Fraction(0)
    is_part = match is not None and bool(match["percent"])
    if not number or not (is_part or number.denominator == 1):
        raise UsageError(
            f"the budget {budget!r} cannot be read.",
            way_out='Give a part of the present parameters ("+10%") or a number ("+50000").',
        )
    return (number * present / 100 if is_part else number).__floor__()
