"""The reading of how many there are to be: ``"2x"``, ``"+32"`` or ``"256"``."""

from __future__ import annotations

import re
from fractions import Fraction

from fxgrow.errors import UsageError

_AMOUNT = re.compile(r"(?P<sign>\+?)(?P<number>\d+(\.\d+)?)(?P<ratio>x?)")


def amount(text: str, old: int, *, what: str, way_out: str) -> int:
    """Return how many are asked for.

    Args:
        text: a ratio (``"1.5x"``, to the nearest), how many more (``"+32"``) or in all (``"256"``).
        old: how many there are.
        what: what is counted, for the error message.
        way_out: likewise.

    Raises:
        UsageError: it is none of these.

    Example:
        >>> [amount(text, 3, what="width", way_out="") for text in ("1.5x", "+5", "100")]
        [5, 8, 100]
    """
    match = _AMOUNT.fullmatch(text.strip())
    if match is None or (match["sign"] and match["ratio"]):
        raise UsageError(f"the {what} {text!r} cannot be read.", way_out=way_out)
    number = Fraction(match["number"])
    if match["ratio"]:
        return (number * old + Fraction(1, 2)).__floor__()
    if number.denominator != 1:
        raise UsageError(f"the {what} {text!r} is not a whole number.", way_out=way_out)
    return int(number) + (old if match["sign"] else 0)
