"""When a metric has stopped improving, so that a network may grow; and what a schedule refuses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NoReturn

from fxgrow.errors import UsageError, shown

MOST_EPOCHS = 1 << 40  # steps may be counted for epochs


def refuse(place: str, why: str) -> NoReturn:
    """Refuse a schedule, because of one of its fields.

    Raises:
        UsageError: always.
    """
    raise UsageError(f"the schedule's {shown(place)} is wrong: {shown(why)}.", name=shown(place))


@dataclass(frozen=True)
class Plateau:
    """When a metric has stopped improving.

    Attributes:
        patience: after so many epochs without an improvement; at least 1.
        threshold: what counts as one, relative to the best so far.
        mode: whether smaller (``min``) or larger values (``max``) are better.
    """

    patience: int = 5
    threshold: float = 1e-3
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UsageError: one is none that could be meant.
        """
        whole(self.patience, "plateau.patience", 1, MOST_EPOCHS)
        if type(self.threshold) not in (int, float) or not 0 <= self.threshold < 1:
            refuse("plateau.threshold", f"{self.threshold!r} is not between 0 and 1")
        if self.mode not in ("min", "max"):
            refuse("plateau.mode", f"{self.mode!r} is neither min nor max")

    def improves(self, value: float, best: float | None) -> bool:
        """Return whether a value is better than the best so far; nan never is."""
        if best is None:
            return not math.isnan(value)
        margin = self.threshold * abs(best)
        return value < best - margin if self.mode == "min" else value > best + margin


def whole(value: object, place: str, least: int, most: int) -> None:
    """Return if a value is a whole number between two others.

    Raises:
        UsageError: it is not.
    """
    if type(value) is not int or not least <= value <= most:
        refuse(place, f"{str(value)[:40]!r} is no whole number from {least} to {most}")
